"""``attnres-compile convert``: a checkpoint to a converted one."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from attnres_compile import cli_options as options
from attnres_compile.cli_screen import progress, say, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_source(parser, "checkpoint", "a Hugging Face directory, or a file of weights")
    parser.add_argument("output", type=Path, help="a new directory, or a file of the same kind")
    parser.add_argument(
        "--names",
        choices=options.NAMINGS,
        default="native",
        help="parameter names: ours, Kimi K3's, or flash-linear-attention's",
    )
    parser.add_argument(
        "--copy", action="store_true", help="copy weights; by default they are hard-linked"
    )
    parser.add_argument(
        "--defer-hashes",
        action="store_true",
        help="do not hash the original files now ('verify --files' does it later)",
    )
    parser.add_argument(
        "--inline", action="store_true", help="of ONNX models: mixes without functions"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    options.add_overwrite(parser)
    options.add_config(parser)
    options.add_model(parser)
    options.add_dangerous(parser)


def run(args: argparse.Namespace) -> int:
    from attnres_compile.checkpoint.converting import (
        Options,
        convert_source,
        needed_space,
        plan_source,
        work_of,
    )
    from attnres_compile.checkpoint.record import as_toml
    from attnres_compile.checkpoint.writing import human

    source, config = options.source_of(args, args.checkpoint), options.config_of(args)
    if args.dry_run:
        plan = plan_source(source, config)
        show(args, plan.to_json(), plan)
        plan.require_streams()
        return 0
    settings = Options(args.names, args.overwrite, args.copy, not args.defer_hashes, args.inline)
    size = needed_space(source, settings, args.output)
    say(args, f"{args.output} will take {human(size)} of new disk space.")
    with progress(args, "writing", work_of(source, settings)) as advance:
        settings = dataclasses.replace(settings, advance=advance)
        plan = convert_source(source, args.output, config, settings)
    if not args.output.is_dir():  # a directory holds it inside, written with the rest
        args.output.with_suffix(".attnres.toml").write_text(as_toml(plan.config))
    done = f"wrote {args.output}: {plan.num_parameters:,} new parameters"
    data = {"output": str(args.output), "names": args.names, "plan": plan.to_json()}
    show(args, data, *([] if args.quiet else [plan, "", done]))
    return 0
