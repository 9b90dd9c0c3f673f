"""``attnres-compile bench``: what mixes cost, in bytes, compiled kernels and time."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from attnres_compile.cli_screen import say, show
from attnres_compile.errors import InputError

_DTYPES = ("bfloat16", "float16", "float32")
_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(
        dest="bench", metavar="WHAT", required=True, prog="attnres-compile bench"
    )
    made = {
        name: _add(verbs, name, sentence)
        for name, sentence in (
            ("bytes", "count what a block loads and stores per token, in the interpreter"),
            ("aot", "compile every kernel of a block for four targets, with no GPU"),
            ("cpu", "time a converted model against the unconverted one, both compiled"),
            ("gpu", "time a block on a GPU against eager PyTorch, Inductor, Liger and fla"),
        )
    }
    _numbers(made["bytes"], completed=8, sublayers=6, width=4096, tokens=512)
    made["bytes"].add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    made["bytes"].add_argument("--norm", choices=("rms", "layer"), default="rms")
    _numbers(made["aot"], width=4096, sources=9, sites=6)
    made["aot"].add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    made["aot"].add_argument("--targets", nargs="+", choices=_TARGETS, default=list(_TARGETS))
    made["aot"].add_argument(
        "--kernels", nargs="+", default=[], metavar="NAME", help="some of them; all if left out"
    )
    made["cpu"].add_argument(
        "--shapes",
        nargs="+",
        choices=("a", "b", "tiny"),
        default=["a", "b"],
        help="a: 12 layers of width 512; b: 24 layers of width 128; tiny: to try the command",
    )
    made["cpu"].add_argument(
        "--modes", nargs="+", choices=("inference", "training"), default=["inference", "training"]
    )
    _numbers(made["cpu"], pairs=21, processes=3)
    _numbers(made["gpu"], width=4096, blocks=8, sublayers=6, tokens=8192, runs=21)


def _add(verbs: Any, name: str, sentence: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=sentence, description=f"{sentence[0].upper()}{sentence[1:]}."
    )
    # A default would win over what is said before the name of the benchmark.
    unsaid: Any = argparse.SUPPRESS
    group = parser.add_argument_group("output")
    group.add_argument(
        "--json",
        nargs="?",
        const=True,
        default=unsaid,
        metavar="FILE",
        help="write one JSON object to FILE, or print it instead of text",
    )
    group.add_argument("--no-color", action="store_true", default=unsaid, help="no colours")
    noise = group.add_mutually_exclusive_group()
    noise.add_argument("-v", "--verbose", action="store_true", default=unsaid, help="say more")
    noise.add_argument("-q", "--quiet", action="store_true", default=unsaid, help="say less")
    return parser


def _numbers(parser: argparse.ArgumentParser, **defaults: int) -> None:
    for name, default in defaults.items():
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"(default: {default})"
        )


def run(args: argparse.Namespace) -> int:
    path = Path(args.json) if isinstance(args.json, str) else None
    if path is not None:
        args.json = False  # tables are printed as well
        if not path.resolve().parent.is_dir():
            raise InputError(f"{path.parent} is no directory; create it, or name another file.")
    result, tables = _BENCHES[args.bench](args)
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")
    show(args, result, *tables)
    if path is not None:
        say(args, f"wrote {path}")
    return 0


def _bytes(args: argparse.Namespace) -> tuple[Any, list[Any]]:
    from attnres_compile.bench import bytes as bench

    case = bench.Case(
        args.completed, args.sublayers, args.width, args.dtype, args.tokens, args.norm
    )
    with _progress(args, "counting in the interpreter", 1) as tick:
        found = bench.measure(case)
        tick()
    title = (
        f"Rows of {case.width} {case.dtype} per token: {case.completed} completed sources, "
        f"{case.sublayers} sublayers"
    )
    rows = [["attnres, counted", f"{found['forward_rows']:.1f}", f"{found['backward_rows']:.1f}"]]
    for peer in found["peers"]:
        backward = "-" if peer["backward_rows"] is None else str(peer["backward_rows"])
        rows.append([f"{peer['name']}, by formula", str(peer["forward_rows"]), backward])
    kernels = [
        [direction, name, str(found[direction]["launches"][name]), f"{moved:.2f}"]
        for direction in ("forward", "backward")
        for name, moved in found[direction]["kernels"].items()
    ]
    kernels += [
        [direction, "Inductor's own", "", f"{found[direction]['inductor']:.2f}"]
        for direction in ("forward", "backward")
    ]
    return found, [
        _table(title, ["", "forward", "backward"], rows),
        _table("Of these", ["direction", "kernel", "launches", "rows"], kernels),
    ]


def _aot(args: argparse.Namespace) -> tuple[Any, list[Any]]:
    from attnres_compile.bench import aot as bench

    block = {key: getattr(args, key) for key in ("width", "sources", "sites", "dtype")}
    total = len(args.kernels or bench.kernels_of_a_block(**block)) * len(args.targets)
    with _progress(args, "compiling", total) as tick:
        found = bench.measure(**block, targets=args.targets, kernels=args.kernels, tick=tick)

    def accesses(counts: dict[int, int]) -> str:
        return " ".join(f"{count}x{size}" for size, count in counts.items()) or "-"

    rows = [
        [
            *(k["kernel"], k["target"]),
            *(str(k[key]) for key in ("warps", "registers", "spills", "shared")),
            *(accesses(k["loads"]), accesses(k["stores"])),
        ]
        for k in found["kernels"]
    ]
    columns = ["kernel", "target", "warps", "registers", "spills", "shared", "loads", "stores"]
    title = (
        f"Width {args.width}, {args.sources} sources, {args.sites} sites, {args.dtype}; "
        "loads and stores as instructions x bytes per thread"
    )
    return found, [_table(title, columns, rows, left=2)]


def _cpu(args: argparse.Namespace) -> tuple[Any, list[Any]]:
    from attnres_compile.bench import cpu as bench

    what = (args.shapes, args.modes, args.pairs, args.processes)
    with _progress(args, "timing", bench.steps_of(*what)) as tick:
        found = bench.measure(*what, tick)
    rows = []
    for name, shape in found["shapes"].items():
        for mode in args.modes:
            keys = (f"{mode}_ratio", f"{mode}_compile_ratio", f"eager_{mode}_ratio")
            ratios = [f"{shape[key]:.3f}" for key in (*keys, f"naive_{mode}_ratio")]
            rows.append([name, mode, *ratios])
    columns = ["shape", "mode", "compiled", "compile time", "eager", "naive, eager"]
    title = (
        f"Converted over unconverted, median of {args.pairs} rounds "
        f"in {found['processes']} processes"
    )
    return found, [_table(title, columns, rows, left=2)]


def _gpu(args: argparse.Namespace) -> tuple[Any, list[Any]]:
    from attnres_compile.bench import gpu as bench

    found = bench.measure(
        width=args.width,
        blocks=args.blocks,
        sublayers=args.sublayers,
        tokens=args.tokens,
        runs=args.runs,
    )
    rows = [[name, *(f"{value:.2f}" for value in f.values())] for name, f in found["forms"].items()]
    columns = ["", "forward ms", "step ms", "forward GB/s", "step GB/s"]
    title = f"{args.blocks} blocks of {args.sublayers} sublayers, {args.tokens} tokens"
    return found, [_table(title, columns, rows)]


_BENCHES = {"bytes": _bytes, "aot": _aot, "cpu": _cpu, "gpu": _gpu}


def _table(title: str, columns: list[str], rows: list[list[str]], left: int = 1) -> Any:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(title=title, box=SIMPLE, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right")
    for row in rows:
        table.add_row(*row)
    return table


@contextlib.contextmanager
def _progress(args: argparse.Namespace, what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error, if that is a terminal; yields what to call after each step."""
    if args.quiet or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)
