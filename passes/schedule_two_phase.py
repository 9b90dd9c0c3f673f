"""Schedule the mixes of a block in two phases, so that each completed source is read once.

All sites of a block attend over the same completed sources; only the partial sum changes from one
to the next. So a block becomes (arXiv 2603.15031, section 4):

* ``attnres::complete`` where a source is completed: the block sum and, while it is at hand, its
  logits towards every later site that attends over it;
* ``attnres::phase1`` where the block begins: the mixes over the completed sources, for all sites;
* ``attnres::phase2`` at each site: that mix merged with the partial sum, by online softmax.

In rows of D elements per token, with n completed sources and S sites, two phases move about
``n + 6S`` forward and ``3n + 7S`` backward, one pass per site ``nS + 4S`` and ``3nS + 5S``. With at
most two sources, or a single site, the one pass moves less, and is what is emitted: an
``attnres::phase2`` that takes the completed sources themselves. ``lower.py`` adds what a CPU needs
for two phases to pay. Mixes under ``torch.no_grad`` share nothing with those that are not. Queries
are stacked where the first source is scored; if one cannot be had there, all get one pass.

Contract: values are the same to rounding, whatever the schedule. Every ``attnres::mix`` of which
only the mix is used becomes an ``attnres::phase2``; nothing else but the additions that complete a
block is changed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import fx

from attnres_compile.kernels import phases  # noqa: F401  registers attnres::complete and so on
from attnres_compile.kernels.reference import arithmetic_dtype
from attnres_compile.passes import operations as ops
from attnres_compile.passes.dataflow import Dataflow
from attnres_compile.passes.gradient_modes import GradientMode, gradient_modes
from attnres_compile.passes.graph_editor import Editor, hoist
from attnres_compile.passes.graph_values import dtype_of, shape_of
from attnres_compile.passes.keep_layouts import put_in_place_of

aten = torch.ops.aten
_FEWEST_SOURCES = 3
_FEWEST_SITES = 2


@dataclass(frozen=True)
class Mix:
    """An ``attnres::mix`` node and its arguments."""

    node: fx.Node
    sources: tuple[fx.Node, ...]
    query: fx.Node
    gain: fx.Node | None
    eps: float
    sums: bool
    dim: int

    @property
    def form(self) -> tuple[fx.Node, float, int]:
        """What mixes of one stream have in common."""
        return self.sources[0], self.eps, self.dim


@dataclass(frozen=True)
class Block:
    """Mixes that attend over the same completed sources, and over a partial sum or not."""

    completed: tuple[fx.Node, ...]
    mixes: tuple[Mix, ...]

    @property
    def moves_less_in_two_phases(self) -> bool:
        return len(self.completed) >= _FEWEST_SOURCES and len(self.mixes) >= _FEWEST_SITES

    def renamed(self, names: Mapping[fx.Node, fx.Node]) -> Block:
        mixes = tuple(
            replace(mix, sources=tuple(names.get(s, s) for s in mix.sources)) for mix in self.mixes
        )
        return Block(tuple(names.get(s, s) for s in self.completed), mixes)

    def partial_of(self, mix: Mix) -> tuple[fx.Node, ...]:
        return mix.sources[len(self.completed) :]


def schedule_two_phase(
    graph: fx.Graph,
    admits: Callable[[Mix], bool] = lambda _: True,
    in_two_phases: Callable[[Block], bool] = lambda block: block.moves_less_in_two_phases,
) -> None:
    """Replaces the mixes of a graph by phases, in place.

    Args:
        graph: torch-level or ATen, with example values, after the residual streams were rewritten.
        admits: which mixes to schedule; all others stay as they are.
        in_two_phases: which blocks get two phases, and not one pass a site.
    """
    for stream in _streams(graph, admits):
        # Read anew: what streams before have become may be sources of this one.
        blocks = find_blocks([_read(mix.node) for mix in stream])
        apart = [block for block in blocks if not in_two_phases(block)]
        together = [block for block in blocks if in_two_phases(block)]
        if together and not _can_share(graph, together):
            apart, together = blocks, []
        # It writes the queries first: the node they stand before may be a mix that goes away.
        writer = _TwoPhaseWriter(graph, together) if together else None
        for block in apart:
            for mix in block.mixes:
                _write_one_pass(graph, mix)
        if writer is not None:
            writer.write()


def find_blocks(mixes: Sequence[Mix]) -> list[Block]:
    """Groups the mixes of one stream, in graph order, by the completed sources that they share.

    A mix over completed sources alone opens the block of those that follow. Where none follow, as
    at the end of the stream, it belongs to the block before, whose sum it takes for a partial one.
    """
    found: list[tuple[tuple[fx.Node, ...], list[Mix]]] = []
    for position, mix in enumerate(mixes):
        later = (m.sources for m in mixes[position + 1 :] if m.sources != mix.sources)
        opens = next(later, ())[:-1] == mix.sources
        completed = found[-1][0] if found else ()
        goes_on = mix.sources[:-1] == completed and not opens
        if completed and (mix.sources == completed or goes_on):
            found[-1][1].append(mix)
            continue
        alone = opens or len(mix.sources) == 1
        found.append((mix.sources if alone else mix.sources[:-1], [mix]))
    return [Block(completed, tuple(members)) for completed, members in found]


def _streams(graph: fx.Graph, admits: Callable[[Mix], bool]) -> list[list[Mix]]:
    """Mixes by their streams; none is a source of another that stands with it.

    So it would be in ``x + g(x)`` where g is itself a stream, which starts at x and ends in a mix.
    """
    streams: dict[tuple[tuple[fx.Node, float, int], GradientMode, int], list[Mix]] = {}
    depths: dict[fx.Node, int] = {}
    modes = _modes(graph)
    for node in graph.nodes:
        if node.target in (torch.ops.attnres.mix, torch.ops.attnres.mix.default):
            mix = _read(node)
            inner = [made for source in mix.sources for made in source.all_input_nodes]
            depths[node] = max((depths[m] + 1 for m in inner if m in depths), default=0)
            plain = all(u.target is operator.getitem and u.args[1] == 0 for u in node.users)
            if plain and admits(mix):
                streams.setdefault((mix.form, modes[node], depths[node]), []).append(mix)
    return [streams[key] for key in sorted(streams, key=lambda key: key[-1])]


def _read(node: fx.Node) -> Mix:
    sources, query, gain, eps, sums, dim = node.args
    rank = len(shape_of(sources[0]))  # type: ignore[index,arg-type]
    return Mix(node, tuple(sources), query, gain, eps, sums, dim % rank - rank)  # type: ignore[arg-type,operator]


def _can_share(graph: fx.Graph, blocks: Sequence[Block]) -> bool:
    """Whether all queries can be had at the first scoring, and sources stay as they were scored."""
    view, modes = Dataflow.of(graph), _modes(graph)
    if not _stay_as_completed(view, blocks, modes):
        return False
    first = _first_scoring(blocks, modes)
    return all(_hoist_parameters(mix, first, view) for block in blocks for mix in block.mixes)


def _modes(graph: fx.Graph) -> dict[fx.Node, GradientMode]:
    return gradient_modes(graph.nodes, at_start=torch.is_grad_enabled())


def _hoist_parameters(mix: Mix, before: fx.Node, view: Dataflow) -> bool:
    parameters = (p for p in (mix.query, mix.gain) if p is not None)
    return all(hoist(p, before, mix.node, view) for p in parameters)


def _stay_as_completed(
    view: Dataflow, blocks: Sequence[Block], modes: Mapping[fx.Node, GradientMode]
) -> bool:
    """Whether nobody writes into a source after it was scored, while its sites still read it."""
    sources = dict.fromkeys(source for block in blocks for source in block.completed)
    return not any(
        view.writes_between(source, _scored_after(source, blocks, modes)) for source in sources
    )


def _scored_after(
    source: fx.Node, blocks: Sequence[Block], modes: Mapping[fx.Node, GradientMode]
) -> fx.Node:
    """Where a source is complete: at its addition, or where a site first reads what it found.

    A source made in another gradient mode than its sites is scored at the first of them, in theirs.
    """
    first = next(block.mixes[0].node for block in blocks if source in block.completed)
    return source if summands(source) and modes[source] == modes[first] else first


def _first_scoring(blocks: Sequence[Block], modes: Mapping[fx.Node, GradientMode]) -> fx.Node:
    """Where the queries of all sites have to be there."""
    sources = dict.fromkeys(source for block in blocks for source in block.completed)
    return min(_scored_after(source, blocks, modes) for source in sources)


def _effective_query(edit: Editor, mix: Mix) -> fx.Node:
    """query * gain, [D] in the arithmetic dtype."""
    dtype = arithmetic_dtype(dtype_of(mix.sources[0]))
    query = edit.cast(mix.query, dtype)
    return (
        query if mix.gain is None else edit.call(aten.mul.Tensor, query, edit.cast(mix.gain, dtype))
    )


def _write_one_pass(graph: fx.Graph, mix: Mix) -> None:
    """The newest source is the addend, completed or not: a site can do the sum that makes it."""
    with graph.inserting_before(mix.node):
        edit = Editor(graph, mix.node)
        *sources, newest = mix.sources
        _write_phase2(edit, mix, _effective_query(edit, mix), [newest], sources=sources)


def _write_phase2(
    edit: Editor,
    mix: Mix,
    query: fx.Node,
    addends: Sequence[fx.Node],
    *,
    sources: Sequence[fx.Node] = (),
    before: fx.Node | None = None,
    statistics: fx.Node | None = None,
) -> None:
    merged = edit.call(
        torch.ops.attnres.phase2.default,
        before=before,
        statistics=statistics,
        sources=list(sources),
        addends=list(addends),
        query=query,
        eps=mix.eps,
        count=float(len(mix.sources)) if mix.sums else 1.0,
        norm="none",
        norm_weight=None,
        norm_bias=None,
        norm_eps=0.0,
        norm_dtype=None,
        wants_mix=True,
        dim=mix.dim,
        kernels="reference",
    )
    mixed = edit.call(operator.getitem, merged, 1)
    for user in list(mix.node.users):
        put_in_place_of(user, mixed)
        user.graph.erase_node(user)
    mix.node.graph.erase_node(mix.node)


class _TwoPhaseWriter:
    """Writes the blocks of one stream that are computed in two phases.

    Their sites are numbered in order; row k of `_queries` is the effective query of site k.
    """

    def __init__(self, graph: fx.Graph, blocks: list[Block]) -> None:
        self._graph = graph
        self._blocks = blocks
        self._modes = _modes(graph)
        self._starts = list(accumulate((len(block.mixes) for block in blocks), initial=0))
        mixes = [mix for block in blocks for mix in block.mixes]
        with graph.inserting_before(_first_scoring(blocks, self._modes)):
            edit = Editor(graph, mixes[0].node)
            self._rows = [_effective_query(edit, mix) for mix in mixes]
            self._queries = edit.call(aten.stack.default, self._rows)
        self._carriers: dict[fx.Node, fx.Node] = {}
        self._logits: dict[tuple[fx.Node, int], fx.Node] = {}

    def write(self) -> None:
        sources = dict.fromkeys(s for block in self._blocks for s in block.completed)
        completed = {source: self._complete(source) for source in sources}
        for number, block in enumerate(self._blocks):
            self._write_block(number, block.renamed(completed))

    def _complete(self, source: fx.Node) -> fx.Node:
        """Scores a source for all sites that attend over it; returns the node of its value."""
        numbers = [i for i, block in enumerate(self._blocks) if source in block.completed]
        using = range(numbers[0], numbers[-1] + 1)
        first, end = self._starts[using.start], self._starts[using.stop]
        mix = self._blocks[using.start].mixes[0]
        after = _scored_after(source, self._blocks, self._modes)
        addends = summands(source) if after is source else []
        with self._graph.inserting_before(after.next if addends else after):
            edit = Editor(self._graph, source)
            outputs = edit.call(
                torch.ops.attnres.complete.default,
                addends or [source],
                self._rows_between(edit, first, end),
                mix.eps,
                mix.dim,
                "reference",
            )
            value = edit.call(operator.getitem, outputs, 0)
            logits = edit.call(operator.getitem, outputs, 1)
            sizes = [len(self._blocks[i].mixes) for i in using]
            parts = edit.call(aten.split_with_sizes.default, logits, sizes)
            by_block = {i: edit.call(operator.getitem, parts, k) for k, i in enumerate(using)}
        completed = value if addends else source
        self._carriers[completed] = value
        self._logits |= {(completed, i): part for i, part in by_block.items()}
        if addends:
            put_in_place_of(source, value)
            self._graph.erase_node(source)
        return completed

    def _write_block(self, number: int, block: Block) -> None:
        with self._graph.inserting_before(block.mixes[0].node):
            edit = Editor(self._graph, block.mixes[0].node)
            outputs = edit.call(
                torch.ops.attnres.phase1.default,
                list(block.completed),
                [self._carriers[source] for source in block.completed],
                [self._logits[source, number] for source in block.completed],
                block.mixes[0].dim,
                "reference",
            )
            mixes, statistics, carriers = (
                edit.call(operator.getitem, outputs, i) for i in range(3)
            )
            statistics = edit.call(aten.unbind.int, statistics)
            for i, source in enumerate(block.completed):
                self._carriers[source] = edit.call(operator.getitem, carriers, i)
        for j, mix in enumerate(block.mixes):
            with self._graph.inserting_before(mix.node):
                edit = Editor(self._graph, mix.node)
                before = edit.call(operator.getitem, mixes, j)
                part = edit.call(operator.getitem, statistics, j)
                row = self._rows[self._starts[number] + j]
                partial = block.partial_of(mix)
                _write_phase2(edit, mix, row, partial, before=before, statistics=part)

    def _rows_between(self, edit: Editor, first: int, end: int) -> fx.Node:
        if (first, end) == (0, len(self._rows)):
            return self._queries
        return edit.call(aten.slice.Tensor, self._queries, 0, first, end)


def summands(node: fx.Node) -> list[fx.Node]:
    """The two tensors that a node adds, if it does that and nothing else; otherwise none."""
    if node.op not in ("call_function", "call_method") or ops.operation(node) != "add":
        return []
    addends = ops.operands(node)
    plain = len(node.args) == 2 and not node.kwargs and ops.writes_into(node) is None
    if not plain or len(addends) != 2:
        return []
    same = all((dtype_of(a), shape_of(a)) == (dtype_of(node), shape_of(node)) for a in addends)
    return addends if same else []
