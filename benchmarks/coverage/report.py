"""The tables of a sweep, as Markdown.

python benchmarks/coverage/report.py coverage.jsonl > docs/coverage.md
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sweep import read_results

STATUSES = ("converted", "refused", "capture failed", "wrong", "not built", "out of time")
_SLOWEST = 10
_STANDS_IN = "stands for the family"  # said by tiny_transformers
_CAUSE = 160  # letters of a sentence that a table shows

Line = dict[str, Any]


def report(lines: list[Line], command: str, note: str = "") -> str:
    """A page: what became of how many, what was not converted and why, and the slowest plans."""
    parts = [_head(lines, command), note, _summary(lines)]
    libraries = list(dict.fromkeys(line["library"] for line in lines))
    for library in libraries:
        parts += _library(library, [line for line in lines if line["library"] == library])
    parts += [_reasons(lines), _slowest(lines)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(lines: list[Line], command: str) -> str:
    return f"""# Coverage

{len(lines)} models with random weights, tiny where their library lets them be, were taken
through a whole conversion: planned, converted, verified (outputs and gradients, `aggregate="sum"`),
stripped bit for bit, and one optimizer step. Where a model amplifies roundings beyond the
tolerance, in float64 too, a difference is held against what one unit in the last place of every
parameter changes in the model itself. Command:

`{command}`

- **converted**: all of that holds. Other additions of the same model may be refused beside it.
  What was refused was tried again with `delta_sources=True`, which goes beyond the paper.
- **refused**: the plan has no stream, and says why.
- **capture failed**: Dynamo could not trace the model whole.
- **wrong**: a difference or an error of ours: a bug.
- **not built**: no tiny config, or no inputs, with which the plain model runs; **out of time**: it
  took longer than the limit. These say nothing of the conversion."""


def _summary(lines: list[Line]) -> str:
    rows = []
    for library in dict.fromkeys(line["library"] for line in lines):
        counts = Counter(line["status"] for line in lines if line["library"] == library)
        captured = counts["converted"] + counts["refused"] + counts["wrong"]
        own = [line for line in lines if line["library"] == library]
        without = sum(line["status"] == "refused" and not line["refusals"] for line in own)
        rows.append(
            [
                library,
                *(counts[status] for status in STATUSES),
                without,
                _share(counts["converted"], captured),
                _share(counts["converted"], captured - without),
                sum(map(_by_option, own)),
            ]
        )
    heads = [
        "library",
        *STATUSES,
        "refused for want of any addition",
        "converted, of those captured",
        "of those with an addition",
        "converted by delta_sources",
    ]
    return _table(heads, rows)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"


def _library(library: str, lines: list[Line]) -> Iterator[str]:
    yield f"## {library}"
    converted = [line for line in lines if line["status"] == "converted"]
    if converted:
        for title, by_option in (("Converted", False), ("Converted by delta_sources", True)):
            names = [
                f"{line['model']} ({line['additions']})"
                for line in converted
                if _by_option(line) == by_option
            ]
            if names:
                yield f"{title}, with the number of residual additions: {', '.join(names)}."
    stand_ins = [line for line in converted if _STANDS_IN in line["detail"]]
    if stand_ins:
        told = (f"{each['model']}: {each['detail'].split('; ')[-1]}" for each in stand_ins)
        yield f"Main classes that do not run alone: {'. '.join(told)}."
    rest = [line for line in lines if line["status"] != "converted"]
    rest.sort(key=lambda line: (STATUSES.index(line["status"]), line["family"]))
    if rest:
        rows = [[line["family"], line["model"], line["status"], _cause(line)] for line in rest]
        yield _table(["family", "model", "", "why"], rows)


def _by_option(line: Line) -> bool:
    """Whether it is converted by an option that goes beyond the paper."""
    return line["status"] == "converted" and line.get("delta_sources", False)


def _cause(line: Line) -> str:
    if line["status"] == "refused" and line["refusals"]:
        return ", ".join(f"{count} x {kind}" for kind, count in line["refusals"].items())
    return _shortened(line["detail"])


def _reasons(lines: list[Line]) -> str:
    """By kind of refusal: in how many models, and the sentence for one of them."""
    kinds: Counter[str] = Counter()
    example: dict[str, str] = {}
    for line in lines:
        for kind, reason in line["reasons"].items():
            kinds[kind] += 1
            example.setdefault(kind, f"{line['model']}: {reason}")
    if not kinds:
        return ""
    rows = [[kind, count, example[kind]] for kind, count in kinds.most_common()]
    return "## Reasons of refusals\n\n" + _table(["kind", "models", "for example"], rows)


def _slowest(lines: list[Line]) -> str:
    """Seconds of planning beside those of capturing, the largest first."""
    planned = [line for line in lines if "plan" in line["seconds"]]
    planned.sort(key=lambda line: -line["seconds"]["plan"])
    rows = [
        [
            line["model"],
            f"{line['seconds']['capture']:.2f}",
            f"{line['seconds']['plan']:.2f}",
            f"{line['seconds']['plan'] / max(line['seconds']['capture'], 1e-3):.2f}",
        ]
        for line in planned[:_SLOWEST]
    ]
    heads = ["model", "capture, s", "planning, s", "ratio"]
    return "## The slowest plans\n\n" + _table(heads, rows) if rows else ""


def _table(heads: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    def line(cells: Iterable[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    heads = list(heads)
    return "\n".join([line(heads), line("---" for _ in heads), *map(line, rows)])


def _shortened(text: str) -> str:
    return text if len(text) <= _CAUSE else text[: _CAUSE - 1] + "…"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument(
        "--command", default="python benchmarks/coverage/sweep.py", help="how they were made"
    )
    parser.add_argument("--note", default="", help="a paragraph on how to read them")
    args = parser.parse_args()
    sys.stdout.write(report(read_results(args.results), args.command, args.note))
    return 0


if __name__ == "__main__":
    sys.exit(main())
