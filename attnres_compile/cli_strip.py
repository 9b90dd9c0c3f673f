"""``attnres-compile strip``: a converted checkpoint back to the original."""

from __future__ import annotations

import argparse
from pathlib import Path

from attnres_compile import cli_options as options
from attnres_compile.cli_screen import progress, say, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_source(parser, "checkpoint", "a converted checkpoint")
    parser.add_argument("output", type=Path, help="a new directory, or a file of the same kind")
    parser.add_argument(
        "--copy", action="store_true", help="copy weights; by default they are hard-linked"
    )
    options.add_overwrite(parser)
    options.add_dangerous(parser)


def run(args: argparse.Namespace) -> int:
    from attnres_compile.checkpoint.converting import Options, work_of
    from attnres_compile.checkpoint.sources import Source
    from attnres_compile.checkpoint.stripping import strip_source

    source = Source(
        args.checkpoint,
        allow_pickle=args.allow_pickle,
        trust_remote_code=args.trust_remote_code,
    )
    settings = Options(overwrite=args.overwrite, copy=args.copy)
    with progress(args, "writing", work_of(source, settings)) as advance:
        settings = Options(overwrite=args.overwrite, copy=args.copy, advance=advance)
        stripped = strip_source(source, args.output, settings)
    if stripped.trained:
        say(
            args,
            f"note: {stripped.trained} queries were trained; the plain model does not compute what "
            "the converted one did.",
        )
    data = {
        "output": str(args.output),
        "checked": stripped.checked,
        "trained_queries": stripped.trained,
    }
    show(args, data, f"wrote {args.output}. {stripped.checked}")
    return 0
