"""``attnres-compile inspect``: what a checkpoint holds, and what its layers attend over."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from attnres_compile import cli_options as options
from attnres_compile.cli_screen import say, show
from attnres_compile.errors import InputError

_PICTURES = (".png", ".svg")
_FORMATS = (*_PICTURES, ".html", ".json")
_HERE = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_source(parser, "checkpoint", "a checkpoint, converted or not")
    parser.add_argument(
        "--depth-attention",
        nargs="+",
        metavar="FILE",
        help="run the model on a batch and draw the heat map: .png, .svg, .html or .json files, "
        "or - for the terminal",
    )
    options.add_overwrite(parser)
    options.add_model(parser)
    options.add_dangerous(parser)


def run(args: argparse.Namespace) -> int:
    source = options.source_of(args, args.checkpoint)
    if args.depth_attention:
        return _depth_attention(args, source)
    from attnres_compile.checkpoint.saving import check_readable
    from attnres_compile.checkpoint.sources import record_of
    from attnres_compile.checkpoint.stripping import new_values
    from attnres_compile.checkpoint.summary import contents, summarize

    check_readable(source.path)
    record = record_of(source)
    if record is None:
        data = contents(source)
        rows = "\n".join(f"{name}: {value}" for name, value in data.items())
        show(args, {**data, "converted": False}, f"{rows}\nNo Attention Residuals.")
        return 0
    summary = summarize(record, new_values(source, record))
    show(args, {**contents(source), **summary.to_json()}, summary)
    return 0


def _depth_attention(args: argparse.Namespace, source: Any) -> int:
    targets = [text for text in args.depth_attention if text != _HERE]
    for text in targets:
        if Path(text).suffix.lower() not in _FORMATS:
            raise InputError(f"{text}: a heat map must end in one of {', '.join(_FORMATS)}.")
        if Path(text).exists() and not args.overwrite:
            raise InputError(f"{text} exists already; name another, or say --overwrite.")
    from attnres_compile.checkpoint.sources import load_source
    from attnres_compile.cli_verify import call_of
    from attnres_compile.heatmap import TerminalHeatMap, write_page
    from attnres_compile.inspection import depth_attention

    converted: Any = load_source(source)
    attention = depth_attention(converted, *call_of(args, source, converted))
    for text in targets:
        path = Path(text)
        if path.suffix.lower() in _PICTURES:
            attention.plot(path)
        elif path.suffix.lower() == ".html":
            title = converted.plan.model
            write_page(attention, path, title=title, overwrite=args.overwrite)
        else:
            path.write_text(json.dumps(attention.to_json(), indent=2) + "\n")
        say(args, f"wrote {path}")
    if args.json or _HERE in args.depth_attention:
        show(args, attention.to_json(), TerminalHeatMap(attention))
    return 0
