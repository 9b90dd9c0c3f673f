"""The spine of a planned model as a picture: sublayers, blocks, sites, and what reads what.

One row per read of the stream. Columns are the sources: the root, each block's sum from the row on
in which the block is complete, and the partial sum of the block in progress. A dot says that the
read attends over that source; the square says into which block the sublayer behind it adds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

from attnres_compile.checkpoint.writing import new_file
from attnres_compile.errors import InputError
from attnres_compile.inspection import source_labels
from attnres_compile.plans import ConversionPlan, PlannedStream, Site

FORMATS = (".svg", ".dot")
_ROW, _COLUMN, _TOP, _LEFT = 24, 30, 96, 34
_TEXT_GAP, _LETTER = 26, 6.6  # pixels; the width of a letter at 12 pixels, roughly
_COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5")
_ROOT = "#5b6270"
_LEGEND = "dot: the read attends over this source; square: the sublayer adds into this block"
_STYLE = """
  text { font: 12px ui-sans-serif, system-ui, "DejaVu Sans", sans-serif; fill: #1f2430 }
  .faint { fill: #6b7280 } .title { font-size: 15px; font-weight: 600 }
  .paper { fill: #ffffff } .halo { stroke: #ffffff }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6e8ee } .faint { fill: #9aa3b2 } .paper { fill: #16181d }
    .halo { stroke: #16181d }
  }
"""


@dataclass(frozen=True)
class Row:
    """One read, and the sublayer that follows it.

    Attributes:
        site: the read; None where a sublayer follows without one.
        sources: indices of the columns that it attends over, 0 for the root.
        sublayer: what stands behind the read; None at the end.
        block: the column of the block that the sublayer adds into.
    """

    site: Site | None
    sources: tuple[int, ...]
    sublayer: str | None
    block: int


def check_drawable(path: Path) -> None:
    """Refuses a picture of another kind before any work is done.

    Raises:
        InputError: the suffix is neither .svg nor .dot.
    """
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{path.name}: the graph must end in {' or '.join(FORMATS)}.")


def draw_spine(
    plan: ConversionPlan, path: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Draws the streams of a plan.

    Args:
        plan: with at least one stream.
        path: the picture, ``.svg`` to look at or ``.dot`` for Graphviz.
        overwrite: replace what is there.

    Raises:
        InputError: another suffix.
        OutputError: the file exists, or cannot be written.

    Example:
        >>> import attnres_compile, tempfile, torchvision
        >>> plan = attnres_compile.plan(torchvision.models.vit_b_16())
        >>> draw_spine(plan, tempfile.mkdtemp() + "/spine.svg")
    """
    target = Path(path)
    check_drawable(target)
    text = as_svg(plan) if target.suffix.lower() == ".svg" else as_dot(plan)
    with new_file(target, overwrite=overwrite) as file:
        file.write_text(text, encoding="utf-8")


def rows(stream: PlannedStream) -> list[Row]:
    """The reads of a stream by depth, each with the sublayer that follows."""
    sites = {site.depth: site for site in stream.sites}
    result, depth = [], 0
    for number, block in enumerate(stream.blocks, start=1):
        for sublayer in block:
            site = sites.get(depth)
            paths = dict.fromkeys(a.module_path or "the model" for a in sublayer.additions)
            result.append(Row(site, _columns(stream, site, number), ", ".join(paths), number))
            depth += len(sublayer.additions)
    last = sites.get(depth)
    return [*result, Row(last, _columns(stream, last, len(stream.blocks)), None, 0)]


def _columns(stream: PlannedStream, site: Site | None, block: int) -> tuple[int, ...]:
    """The columns of a site's sources; the partial sum is that of the present block."""
    if site is None or site.left_out:
        return ()
    labels = source_labels(stream, site) if site.num_sources > 1 else ("root",)
    numbers = {"root": 0, "partial": block}
    return tuple(
        numbers[label] if label in numbers else int(label.removeprefix("block "))
        for label in labels
    )


def as_svg(plan: ConversionPlan) -> str:
    """The picture as SVG text, light or dark as the viewer is."""
    parts: list[str] = []
    top, width = 0, 0.0
    for stream in plan.streams:
        drawn, height, needed = _stream_svg(stream, top)
        parts += drawn
        top += height
        width = max(width, needed)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{top}" '
        f'viewBox="0 0 {width:.0f} {top}" role="img" aria-label="Attention Residuals of '
        f'{escape(plan.model)}">\n<style>{_STYLE}</style>\n'
        f'<rect class="paper" width="100%" height="100%"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _stream_svg(stream: PlannedStream, top: int) -> tuple[list[str], int, float]:
    table = rows(stream)
    blocks = len(stream.blocks)
    text_x = _LEFT + (blocks + 1) * _COLUMN + _TEXT_GAP
    first_y = top + _TOP
    parts = [
        f'<text class="title" x="16" y="{top + 30}">{escape(stream.name)}</text>',
        f'<text class="faint" x="16" y="{top + 50}">{len(stream.sublayers)} sublayers in '
        f"{blocks} blocks, {len(stream.sites)} sites, {stream.num_parameters:,} new parameters"
        "</text>",
        *_column_heads(blocks, top + _TOP - 18),
        *_lines(stream, table, first_y),
    ]
    second_x = text_x + max(len(_reader(row)) for row in table) * _LETTER + 16
    for index, row in enumerate(table):
        y = first_y + index * _ROW
        parts += _row_svg(row, y)
        parts.append(f'<text x="{text_x}" y="{y + 4}">{escape(_reader(row))}</text>')
        if row.sublayer is not None:
            parts.append(
                f'<text class="faint" x="{second_x:.0f}" y="{y + 4}">'
                f"&#8594; {escape(row.sublayer)}</text>"
            )
    bottom = first_y + len(table) * _ROW + 8
    parts.append(f'<text class="faint" x="16" y="{bottom}">{_LEGEND}</text>')
    longest = max(len(row.sublayer or "") for row in table)
    width = max(second_x + (longest + 3) * _LETTER, len(_LEGEND) * _LETTER)
    return parts, _TOP + len(table) * _ROW + 32, width + 24


def _column_heads(blocks: int, y: int) -> Iterator[str]:
    for column in range(blocks + 1):
        label = str(column) if column else "root"
        yield (f'<text class="faint" x="{_x(column)}" y="{y}" text-anchor="middle">{label}</text>')


def _lines(stream: PlannedStream, table: list[Row], first_y: int) -> Iterator[str]:
    """A vertical line for each source, from where it begins to its last reader; thin until a
    block is complete, since it is the partial sum until then."""
    end = first_y + (len(table) - 1) * _ROW
    yield _line(0, first_y, end, 3.5)
    start = 0
    for number, block in enumerate(stream.blocks, start=1):
        begin, complete = first_y + start * _ROW, first_y + (start + len(block)) * _ROW
        yield _line(number, begin, complete, 1.5, dashed=True)
        yield _line(number, complete, max(end, complete), 3.5)
        start += len(block)


def _line(column: int, y1: int, y2: int, width: float, *, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="2 4"' if dashed else ""
    return (
        f'<line x1="{_x(column)}" y1="{y1}" x2="{_x(column)}" y2="{y2}" stroke="{_color(column)}" '
        f'stroke-width="{width}" stroke-linecap="round" opacity="0.55"{dash}/>'
    )


def _row_svg(row: Row, y: int) -> Iterator[str]:
    right = max((*row.sources, row.block), default=0)
    left = min((*row.sources, row.block or right), default=0)
    if right > left:
        yield (
            f'<line x1="{_x(left)}" y1="{y}" x2="{_x(right)}" y2="{y}" stroke="#9aa3b2" '
            'stroke-width="1" opacity="0.5"/>'
        )
    for column in row.sources:
        yield (
            f'<circle class="halo" cx="{_x(column)}" cy="{y}" r="5.5" fill="{_color(column)}" '
            'stroke-width="1.5"/>'
        )
    if row.block:
        x, below = _x(row.block), y + _ROW // 2
        yield (
            f'<rect class="halo" x="{x - 4}" y="{below - 4}" width="8" height="8" rx="1.5" '
            f'fill="{_color(row.block)}" stroke-width="1.5"/>'
        )


def as_dot(plan: ConversionPlan) -> str:
    """The picture as a graph for Graphviz: sources to sites, sites to sublayers to blocks."""
    lines = [
        "digraph spine {",
        '  rankdir=TB; node [shape=box, style="rounded,filled", fillcolor="#f4f5f7", '
        'color="#9aa3b2", fontname="Helvetica"]; edge [color="#9aa3b2"];',
    ]
    for number, stream in enumerate(plan.streams):
        lines += _stream_dot(stream, f"s{number}")
    return "\n".join([*lines, "}", ""])


def _stream_dot(stream: PlannedStream, prefix: str) -> Iterator[str]:
    table = rows(stream)
    sources = {0: f"{prefix}_root"}
    yield f"  subgraph cluster_{prefix} {{ label={_quoted(stream.name)}; color=none;"
    yield f"    {prefix}_root [label={_quoted('root: ' + stream.root)}, shape=oval];"
    for index, row in enumerate(table):
        reader = f"{prefix}_h{index}"
        if row.site is not None:
            label = _quoted(_reader(row))
            yield f'    {reader} [label={label}, shape=oval, fillcolor="#ffffff"];'
        for column in row.sources:
            source = sources.setdefault(column, f"{prefix}_b{column}")
            yield f'    {source} -> {reader} [color="{_color(column)}"];'
        if row.sublayer is None:
            continue
        layer, block = f"{prefix}_f{index}", sources.setdefault(row.block, f"{prefix}_b{row.block}")
        yield f"    {layer} [label={_quoted(row.sublayer)}];"
        if row.site is not None:
            yield f"    {reader} -> {layer} [style=bold];"
        yield f'    {layer} -> {block} [style=dashed, color="{_color(row.block)}"];'
    for column, name in sources.items():
        if column:
            color = _color(column)
            yield f'    {name} [label="block {column}", fillcolor="{color}", fontcolor=white];'
    yield "  }"


def _reader(row: Row) -> str:
    if row.site is None:
        return "(not read)"
    reader = row.site.module_path or "the model's output"
    return f"{reader} (left out)" if row.site.left_out else reader


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _x(column: int) -> int:
    return _LEFT + column * _COLUMN


def _color(column: int) -> str:
    return _ROOT if column == 0 else _COLORS[(column - 1) % len(_COLORS)]
