"""``attnres-compile plan``: what a conversion would do."""

from __future__ import annotations

import argparse
from pathlib import Path

from attnres_compile import cli_options as options
from attnres_compile.cli_screen import say, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_source(
        parser, "checkpoint", "a Hugging Face directory or its config.json, or a file of weights"
    )
    parser.add_argument(
        "--graph",
        type=Path,
        metavar="FILE",
        help="draw the spine: sublayers, blocks, sites, what reads what (.svg or .dot)",
    )
    parser.add_argument(
        "--why",
        metavar="PATH",
        help="say of each addition under a module path what it is, or what rule decided that it is "
        "none (a pattern as for --sites)",
    )
    options.add_overwrite(parser)
    options.add_config(parser)
    options.add_model(parser)
    options.add_dangerous(parser)


def run(args: argparse.Namespace) -> int:
    from attnres_compile.checkpoint.converting import plan_source
    from attnres_compile.spine_drawing import check_drawable, draw_spine

    if args.graph is not None:
        check_drawable(args.graph)
    plan = plan_source(options.source_of(args, args.checkpoint), options.config_of(args))
    if args.why is not None:
        why = plan.why(args.why)
        show(args, why.to_json(), str(why))
        return 0
    show(args, plan.to_json(), plan)
    plan.require_streams()
    if args.graph is not None:
        draw_spine(plan, args.graph, overwrite=args.overwrite)
        say(args, f"wrote {args.graph}")
    return 0
