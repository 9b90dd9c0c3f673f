"""Depth attention to look at: a page for the browser, and a table for the terminal.

The picture by matplotlib is in `inspection`; here nothing is needed but the numbers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnres_compile.checkpoint.writing import new_file

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions

    from attnres_compile.inspection import DepthAttention

_STRONGEST = 3
_MOST_COLUMNS = 12  # up to which a cell of the terminal shows its number
_SHADES = " ·░▒▓█"
_CSS = """
:root { color-scheme: light dark; --ink: #1f2430; --faint: #6b7280; --paper: #fff;
  --line: #e5e7eb; --low: 245 247 251; --tip: #1f2430; --tip-ink: #fff }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ee; --faint: #9aa3b2; --paper: #16181d;
  --line: #2b2f38; --low: 32 36 44; --tip: #e6e8ee; --tip-ink: #16181d } }
body { font: 14px/1.45 ui-sans-serif, system-ui, "DejaVu Sans", sans-serif; color: var(--ink);
  background: var(--paper); margin: 2.5rem auto; max-width: 72rem; padding: 0 1.5rem }
h1 { font-size: 1.35rem; margin: 0 0 .25rem } h2 { font-size: 1rem; margin: 2rem 0 .5rem }
p { color: var(--faint); margin: .25rem 0; max-width: 60rem }
.wide { overflow-x: auto }
table { border-collapse: separate; border-spacing: 2px; font-variant-numeric: tabular-nums }
th { font-weight: 500; color: var(--faint); font-size: 12px; padding: 0 .4rem; text-align: right }
thead th { text-align: center; white-space: nowrap }
td { width: 3rem; min-width: 2.4rem; height: 1.55rem; border-radius: 3px; text-align: center;
  font-size: 12px }
td.none { background: none } td.entropy { width: 7rem; text-align: left }
tr:hover th { color: var(--ink) }
.bar { display: block; height: .5rem; border-radius: .25rem; background: #9aa3b2; min-width: 2px }
tbody tr { position: relative }
.tip { display: none; position: absolute; left: 11rem; top: 1.9rem; z-index: 1;
  padding: .5rem .75rem; background: var(--tip); color: var(--tip-ink); border-radius: 6px;
  font-size: 12px;
  text-align: left; white-space: nowrap; pointer-events: none }
tr:hover .tip, tr:focus-within .tip { display: block }
.tip b { font-weight: 600 }
"""


@dataclass(frozen=True)
class Line:
    """One site, ready to be shown.

    Attributes:
        name: what it stands before.
        weights: by source, the mean over tokens.
        entropy: in nats.
        strongest: the sources with the largest weights, the largest first.
    """

    name: str
    weights: dict[str, float]
    entropy: float
    strongest: tuple[str, ...]

    @property
    def evenness(self) -> float:
        """The entropy over the largest possible: 1 if all sources weigh alike."""
        return self.entropy / math.log(len(self.weights))


def panels(attention: DepthAttention) -> dict[str, list[Line]]:
    """By stream, its sites in order."""
    means, entropies = attention.mean(), attention.entropy()
    found: dict[str, list[Line]] = {}
    for name, stream in attention.streams.items():
        weights = dict(zip(attention.sources[name], means[name].tolist(), strict=True))
        strongest = sorted(weights, key=lambda source: -weights[source])[:_STRONGEST]
        short = name.rpartition("attnres.")[2].removeprefix("before_")
        line = Line(short, weights, entropies[name], tuple(strongest))
        found.setdefault(stream, []).append(line)
    return found


def columns(lines: list[Line]) -> list[str]:
    """All sources of some sites in order, the partial sum last."""
    labels = dict.fromkeys(source for line in lines for source in line.weights)
    return sorted(labels, key=lambda label: label == "partial")


def write_page(
    attention: DepthAttention,
    path: str | os.PathLike[str],
    *,
    title: str,
    overwrite: bool = False,
) -> None:
    """Writes the heat map as one HTML file that needs nothing else, no script and no network.

    Args:
        attention: what `depth_attention` returned.
        path: the file.
        title: heading of the page, the model's name.
        overwrite: replace what is there.

    Raises:
        OutputError: the file exists, or cannot be written.
    """
    with new_file(Path(path), overwrite=overwrite) as file:
        file.write_text(as_page(attention, title), encoding="utf-8")


def as_page(attention: DepthAttention, title: str) -> str:
    """The page as text."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Depth attention of {escape(title)}</title><style>{_CSS}</style></head><body>",
        f"<h1>Depth attention of {escape(title)}</h1>",
        "<p>One row per read of the residual stream, one column per source. A cell is the weight "
        "of that source, averaged over the tokens of one batch; the weights of a row sum to one. "
        "Point at a row for its entropy and its strongest sources.</p>",
    ]
    for stream, lines in panels(attention).items():
        parts += [f"<h2>{escape(stream)}</h2>", '<div class="wide">', *_table(lines), "</div>"]
    return "\n".join([*parts, "</body></html>", ""])


def _table(lines: list[Line]) -> Iterator[str]:
    heads = columns(lines)
    yield "<table><thead><tr><th></th>"
    yield "".join(f"<th>{escape(head)}</th>" for head in heads)
    yield "<th>entropy</th></tr></thead><tbody>"
    for line in lines:
        cells = "".join(_cell(line, head) for head in heads)
        bar = f'<span class="bar" style="width:{line.evenness * 100:.0f}%"></span>'
        yield (
            f'<tr tabindex="0"><th>{escape(line.name)}{_tip(line)}</th>{cells}'
            f'<td class="entropy">{bar}</td></tr>'
        )
    yield "</tbody></table>"


def _cell(line: Line, source: str) -> str:
    weight = line.weights.get(source)
    if weight is None:
        return '<td class="none"></td>'
    ink = "#fff" if weight > 0.6 else "inherit"
    return (
        f'<td style="background:color-mix(in srgb, #2159c4 {weight * 100:.1f}%, '
        f'rgb(var(--low)));color:{ink}">{weight:.2f}</td>'
    )


def _tip(line: Line) -> str:
    strongest = ", ".join(f"{escape(s)} {line.weights[s]:.3f}" for s in line.strongest)
    return (
        f'<span class="tip"><b>{escape(line.name)}</b><br>entropy {line.entropy:.3f} of '
        f"{math.log(len(line.weights)):.3f} nats<br>strongest: {strongest}</span>"
    )


@dataclass(frozen=True)
class TerminalHeatMap:
    """The heat map for a terminal of any width: shades behind the numbers, or shades of type."""

    attention: DepthAttention

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        from rich.text import Text

        for stream, lines in panels(self.attention).items():
            yield Text(f"Stream {stream}", style="bold")
            yield _terminal_table(lines, options.max_width)
            yield Text()
        yield Text(
            "Per cent of each source (R root, P partial sum, else blocks), mean over tokens; "
            "H entropy in nats.",
            style="dim",
        )


def _terminal_table(lines: list[Line], width: int) -> Any:
    from rich.table import Table

    heads = columns(lines)
    numbered = len(heads) <= _MOST_COLUMNS
    cell = 4 if numbered else 1  # with the space between
    longest = max(len(line.name) for line in lines)
    table = Table(box=None, pad_edge=False, padding=(0, 1 if numbered else 0, 0, 0))
    table.add_column("read by", width=max(min(longest, width - cell * len(heads) - 7), 8))
    for head in heads:
        table.add_column(_head(head) if numbered else "", width=cell - 1 or 1, justify="right")
    table.add_column("H", justify="right", width=5)
    for line in lines:
        cells = [_shade(line.weights.get(head), numbered) for head in heads]
        table.add_row(_fitting(line.name, table), *cells, f"{line.entropy:.2f}")
    return table


def _fitting(name: str, table: Any) -> str:
    """The name, shortened in the middle: its beginning and its end both tell."""
    room = table.columns[0].width
    if len(name) <= room:
        return name
    return f"{name[: room // 2 - 1]}…{name[-(room - room // 2) :]}"


def _head(source: str) -> str:
    """``root`` as R, ``partial`` as P, and blocks by their number."""
    return source.removeprefix("block ") if source.startswith("block ") else source[:1].upper()


def _shade(weight: float | None, numbered: bool) -> Any:
    from rich.text import Text

    if weight is None:
        return Text("")
    if not numbered:
        return Text(_SHADES[min(int(weight * len(_SHADES) * 1.5), len(_SHADES) - 1)])
    level = min(weight * 1.25, 1.0)
    red, green, blue = (round(255 + (end - 255) * level) for end in (33, 89, 196))
    ink = "white" if weight > 0.35 else "black"
    return Text(f"{weight * 100:3.0f}", style=f"{ink} on rgb({red},{green},{blue})")
