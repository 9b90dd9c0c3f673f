"""Plans and reports as tables, on a terminal through rich and as plain text.

rich is imported inside the functions only, so that importing the package stays cheap.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from attnres_compile.passes.classify_readers import Reader
from attnres_compile.passes.streams import Refusal
from attnres_compile.plans import LEFT_OUT, ConversionPlan, PlannedStream, place

if TYPE_CHECKING:
    from rich.console import RenderableType

    from attnres_compile.comparing import Comparison
    from attnres_compile.verification import VerifyReport

_DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_MOST_NAMED = 3  # readers that are named one by one; the rest is counted


def to_text(value: ConversionPlan | VerifyReport, width: int = 100) -> str:
    """A plan or a report as plain text, without colour codes or trailing blanks.

    Args:
        value: anything of this package that knows how to draw itself.
        width: columns; readable from 80 on.

    Example:
        >>> import torchvision, attnres_compile
        >>> plan = attnres_compile.plan(torchvision.models.vit_b_16())
        >>> to_text(plan).splitlines()[0]
        'VisionTransformer: 24 residual additions in 1 stream, 36,864 new parameters (+0.043%)'
    """
    from rich.console import Console

    text = io.StringIO()
    console = Console(file=text, width=width, color_system=None, force_terminal=False)
    console.print(value.__rich__(), soft_wrap=False)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def render_plan(plan: ConversionPlan) -> RenderableType:
    """What a plan converts, at which cost, and what it refuses, as something rich can print."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(_headline(plan)), Text(f"Options: {_options(plan)}")]
    for stream in plan.streams:
        parts += [
            Text(),
            Text(f"Stream {stream.name}", style="bold"),
            _facts(_stream_facts(stream, plan)),
        ]
    if plan.refusals:
        parts += [Text(), Text("Not converted", style="bold"), _refusals(plan.refusals)]
    return Group(*parts)


def render_report(report: VerifyReport) -> RenderableType:
    """The comparisons of a `VerifyReport`, its verdict, and the rule that it goes by."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("dtype", no_wrap=True)
    table.add_column("compared", overflow="fold")
    for heading in ("abs error", "rel error", "allowed"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for label, worst in _report_rows(report.comparisons):
        errors = [f"{x:.1e}" for x in (worst.absolute, worst.relative, worst.tolerance)]
        mark = "ok" if worst.passed else "FAILED"
        table.add_row(worst.dtype, label, *errors, mark, style=None if worst.passed else "red")
    verdict = "passed" if report.passed else "FAILED"
    title = f"{report.model}, original against converted: {verdict}"
    return Group(
        Text(title, style="bold" if report.passed else "bold red"),
        table,
        Text(report.rule),
        *(Text(f"Note: {note}") for note in report.notes),
    )


def _report_rows(comparisons: Iterable[Comparison]) -> list[tuple[str, Comparison]]:
    """Labels, each with the worst comparison it stands for.

    Outputs are grouped by pattern (a cache has two tensors per layer); of the gradients there is
    one row with the worst, or a row for every pattern that failed.
    """
    groups: dict[tuple[str, str, str], list[Comparison]] = defaultdict(list)
    for each in comparisons:
        pattern = _pattern(each.name) if each.kind == "output" or not each.passed else ""
        groups[each.dtype, each.kind, pattern].append(each)
    rows = []
    for (_, kind, pattern), group in groups.items():
        worst = max(group, key=_badness)
        times = f" x {len(group)}" if len(group) > 1 else ""
        if kind == "output":
            rows.append((f"{pattern}{times}", worst))
        elif pattern:
            rows.append((f"gradient of {pattern}{times}, worst of {worst.name}", worst))
        else:
            count = _count(len(group), "gradient")
            rows.append((f"{count}, worst of {worst.name}", worst))
    return rows


def _badness(comparison: Comparison) -> float:
    return math.inf if math.isnan(comparison.relative) else comparison.relative


def _headline(plan: ConversionPlan) -> str:
    if not plan.streams:
        return f"{plan.model}: nothing to convert"
    additions = _count(plan.num_residual_additions, "residual addition")
    streams = _count(len(plan.streams), "stream")
    headline = f"{plan.model}: {additions} in {streams}, {plan.num_parameters:,} new parameters"
    if not plan.base_parameters:
        return headline
    return f"{headline} (+{plan.num_parameters / plan.base_parameters:.3%})"


def _options(plan: ConversionPlan) -> str:
    given = {name: value for name, value in plan.config.to_json().items() if value is not None}
    return ", ".join(f"{name}={value!r}" for name, value in given.items())


def _facts(facts: Iterable[tuple[str, str]]) -> RenderableType:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold")
    for label, text in facts:
        grid.add_row(f"  {label}", text)
    return grid


def _stream_facts(stream: PlannedStream, plan: ConversionPlan) -> list[tuple[str, str]]:
    queries = sum(site.query_name is not None for site in stream.sites)
    kinds = "a query and a key gain" if plan.config.key_gain else "a query"
    dimension = (
        "the last dimension" if stream.channel_dim == -1 else f"dimension {stream.channel_dim}"
    )
    deltas = [("sources", "the root, and the differences that blocks make to the state")]
    return [
        ("owner", stream.owner or "the model itself"),
        ("root", stream.root),
        *(deltas if stream.deltas else []),
        ("depth", _depth(stream)),
        ("width", f"{stream.width:,} channels in {dimension}, {stream.dtype}"),
        ("blocks", _blocks(stream)),
        ("sites", f"{len(stream.sites)}, {queries} of them with {kinds}{_left_out(stream)}"),
        ("new parameters", f"{stream.num_parameters:,}"),
        ("inference memory", f"{_inference_bytes(stream):,} more bytes per token in flight"),
        ("training memory", f"{_training_bytes(stream):,} more bytes per token kept for backward"),
        ("readers", _readers(stream, plan)),
    ]


def _left_out(stream: PlannedStream) -> str:
    causes = Counter(LEFT_OUT[site.left_out_by] for site in stream.sites if site.left_out)
    read = "state as it is" if stream.deltas else "plain residual sum"
    counts = "".join(f", {count} left out{cause}" for cause, count in causes.items())
    return f"{counts} (they read the {read})" if causes else ""


def _depth(stream: PlannedStream) -> str:
    additions = _count(len(stream.additions), "residual addition")
    sublayers = _count(len(stream.sublayers), "sublayer")
    return f"{additions} in {sublayers} of {_count(stream.num_layers, 'layer')}"


def _blocks(stream: PlannedStream) -> str:
    """``8: 7 x 2 + 10 sublayers = 7 x 1 + 5 layers``."""
    sublayers = [len(block) for block in stream.blocks]
    layers = [len({sublayer.layer for sublayer in block}) for block in stream.blocks]
    text = f"{len(sublayers)}: {_run_lengths(sublayers)} sublayers"
    if sum(layers) > stream.num_layers:
        return f"{text}; layers are split between blocks"
    return f"{text} = {_run_lengths(layers)} layers"


def _run_lengths(numbers: Sequence[int]) -> str:
    """``[2, 2, 2, 5]`` as ``3 x 2 + 5``."""
    runs = [(len(list(run)), number) for number, run in groupby(numbers)]
    return " + ".join(str(n) if count == 1 else f"{count} x {n}" for count, n in runs)


def _inference_bytes(stream: PlannedStream) -> int:
    return stream.inference_values_per_token * _DTYPE_BYTES[stream.dtype]


def _training_bytes(stream: PlannedStream) -> int:
    """Sources have the stream's dtype; the two statistics per source that of the arithmetic."""
    statistics = 2 * sum(site.num_sources for site in stream.sites if site.num_sources > 1)
    sources = stream.training_values_per_token - statistics
    size = _DTYPE_BYTES[stream.dtype]
    return sources * size + statistics * max(size, _DTYPE_BYTES["float32"])


def _readers(stream: PlannedStream, plan: ConversionPlan) -> str:
    readers = [reader for site in stream.sites for reader in site.readers]
    others = [reader for reader in readers if not reader.scale_invariant]
    text = _count(len(readers) - len(others), "scale-invariant norm")
    if not others:
        return text
    text += f", {len(others)} other: {_named(others)}"
    if plan.config.aggregate == "mean":
        do = "this 1 does" if len(others) == 1 else f"these {len(others)} do"
        text += (
            f'. With aggregate="mean" {do} not see the same function as before; '
            'aggregate="sum" is lossless for every reader'
        )
    return text


def _named(readers: Sequence[Reader]) -> str:
    """Readers grouped by pattern: ``layers.*.mixer (linear) x 12``."""
    groups: dict[str, int] = defaultdict(int)
    for reader in readers:
        name = f"{_pattern(reader.module_path)} ({reader.operation})"
        groups["the model's output" if reader.operation == "output" else name] += 1
    names = [name if count == 1 else f"{name} x {count}" for name, count in groups.items()]
    rest = len(names) - _MOST_NAMED
    shown = ", ".join(names[:_MOST_NAMED])
    return f"{shown} and {rest} more kinds" if rest > 0 else shown


def _refusals(refusals: Sequence[Refusal]) -> RenderableType:
    """Per reason: how many additions, in which modules, and where the first of each stands."""
    from rich.table import Table

    reasons: dict[str, dict[str, list[Refusal]]] = defaultdict(lambda: defaultdict(list))
    for refusal in refusals:
        named = refusal.reason.startswith(refusal.kind)
        reason = refusal.reason if named else f"{refusal.kind}: {refusal.reason}"
        reasons[reason][_pattern(refusal.module_path)].append(refusal)
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(overflow="fold")
    for reason, patterns in reasons.items():
        grid.add_row(f"  {sum(map(len, patterns.values()))}", reason)
        for pattern, group in patterns.items():
            times = f"{len(group)} x {pattern}, first: " if len(group) > 1 else ""
            grid.add_row("", f"- {times}{place(group[0])}")
    return grid


def _pattern(module_path: str) -> str:
    """A module path with its indices replaced: ``layers.*.mlp``."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", module_path) or "the model itself"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
