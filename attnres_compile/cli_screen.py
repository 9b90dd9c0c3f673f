"""What a verb shows: results on standard output, progress on standard error of a terminal."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any


def show(args: argparse.Namespace, data: Any, *renderables: Any) -> None:
    """Prints a result: JSON if that was asked for, text otherwise."""
    if args.json:
        print(json.dumps(data, indent=2))
        return
    console = _console()
    for each in renderables:
        console.print(each, soft_wrap=isinstance(each, str), highlight=False, markup=False)


def say(args: argparse.Namespace, sentence: str) -> None:
    """A remark beside the result."""
    if not args.quiet:
        print(sentence, file=sys.stderr)


@contextlib.contextmanager
def progress(args: argparse.Namespace, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, if that is a terminal; yields what to tell the bytes done."""
    if args.quiet or args.json or not sys.stderr.isatty() or total <= 0:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


def _console() -> Any:
    from rich.console import Console

    return Console(file=sys.stdout)
