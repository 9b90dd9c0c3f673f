"""Sweep whole model libraries through a conversion, one process per model.

    python benchmarks/coverage/sweep.py --output coverage.jsonl            # one per family
    python benchmarks/coverage/sweep.py --output coverage.jsonl --all --jobs 8
    python benchmarks/coverage/sweep.py --output coverage.jsonl --delta-sources   # what was refused

A line of JSON per model is appended to the output; models that have a line are not run again, so
that a sweep that was stopped goes on. `report.py` makes the tables.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

LIBRARIES = ("transformers", "timm", "torchvision")
Task = tuple[str, str]


def tasks(libraries: Iterable[str], *, every_class: bool) -> list[Task]:
    """What to run, as library and name: every class, or the main one of every family."""
    import tiny_transformers
    import tiny_vision

    found: list[Task] = []
    for library in libraries:
        if library == "timm":
            found += [(library, module) for module in tiny_vision.timm_models()]
        elif library == "torchvision":
            found += [(library, name) for name in tiny_vision.torchvision_models()]
        elif every_class:
            found += [(library, name) for name in tiny_transformers.architectures()]
        else:
            found += [(library, name) for name in tiny_transformers.main_architectures()]
    return found


@dataclass
class Running:
    """A worker at work."""

    task: Task
    process: Any
    started: float


def sweep(
    todo: list[Task], *, jobs: int, limit: float, delta_sources: bool = False
) -> Iterator[dict[str, Any]]:
    """Results as they come, of one process per model with a time limit.

    Args:
        todo: library and name of each model.
        jobs: processes at a time.
        limit: seconds that a model may take.
        delta_sources: look for the streams that this option is for.
    """
    # The server starts without this process's sys.path, and ignores modules it does not find.
    here = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["preload"])
    waiting, running = list(reversed(todo)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            task = waiting.pop()
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(task, send, delta_sources), daemon=True)
            process.start()
            send.close()
            running[receive] = Running(task, process, time.monotonic())
        for receive in wait(list(running), timeout=1.0):
            assert isinstance(receive, Connection)
            worker = running.pop(receive)
            yield _received(receive, worker)
            worker.process.join()
        for receive, worker in list(running.items()):
            if time.monotonic() - worker.started > limit:
                worker.process.kill()
                worker.process.join()
                del running[receive]
                yield _lost(worker.task, "out of time", f"more than {limit:.0f} seconds")


def _received(receive: Connection, worker: Running) -> dict[str, Any]:
    try:
        result: dict[str, Any] = receive.recv()
    except EOFError:
        worker.process.join()
        code = worker.process.exitcode
        return _lost(worker.task, "wrong", f"its process ended with exit code {code}")
    return result


def _lost(task: Task, status: str, detail: str) -> dict[str, Any]:
    from check_model import Result, builder

    library, name = task
    return Result(name, library, builder(library, name)[0], status, detail).to_json()


def _work(task: Task, send: Connection, delta_sources: bool) -> None:
    import torch

    from check_model import check

    # A fork makes torch's thread pool anew at its first use; autograd's threads would race for it.
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  until the process ends
    send.send(check(*task, delta_sources=delta_sources).to_json())
    send.close()


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of a sweep; the last one counts where a model has several."""
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return list({(line["library"], line["model"]): line for line in lines}.values())


def _may_have_deltas(line: dict[str, Any] | None) -> bool:
    """Whether additions of a model were all refused, without the option."""
    if line is None or line["status"] != "refused":
        return False
    return bool(line["refusals"]) and not line.get("delta_sources")


def _show(todo: list[Task], done: int, results: Iterator[dict[str, Any]], path: Path) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        path.open("a") as file,
        Progress(
            *columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal
        ) as bar,
    ):
        shown = bar.add_task("sweep", total=len(todo) + done, completed=done)
        for result in results:
            file.write(json.dumps(result) + "\n")
            file.flush()
            bar.update(shown, advance=1, description=f"{result['model']}: {result['status']}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON lines; resumed if there")
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--all", action="store_true", help="every class, not one per family")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every N-th model only")
    parser.add_argument("--offset", type=int, default=0, metavar="K", help="start at the K-th")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="these only, anew")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--time-limit", type=float, default=180, metavar="SECONDS")
    parser.add_argument(
        "--delta-sources",
        action="store_true",
        help="anew what was refused so far, with this option",
    )
    args = parser.parse_args()

    everything = tasks(args.libraries, every_class=args.all or bool(args.models))
    lines = {(line["library"], line["model"]): line for line in read_results(args.output)}
    if args.models:
        chosen = todo = [task for task in everything if task[1] in args.models]
    elif args.delta_sources:
        chosen = todo = [t for t in everything if _may_have_deltas(lines.get(t))]
    else:
        chosen = everything[args.offset :: args.every]
        todo = [task for task in chosen if task not in lines]
    results = sweep(todo, jobs=args.jobs, limit=args.time_limit, delta_sources=args.delta_sources)
    _show(todo, len(chosen) - len(todo), results, args.output)
    wrong = [r for r in read_results(args.output) if r["status"] == "wrong"]
    print(f"{len(wrong)} wrong in {args.output}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
