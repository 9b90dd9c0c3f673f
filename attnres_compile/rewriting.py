"""Carry out a plan on a captured graph: find the marker, find its streams again, rewrite them.

The graph may hold one owner (its own compiled forward), several (an outer compile, an export), and
owners inside owners. Each marker is matched with the streams inside its owner's call; whatever does
not match exactly is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx, nn

from attnres_compile.capture import annotate_dynamo, annotate_export, open_bodies
from attnres_compile.errors import MismatchError
from attnres_compile.layout import OwnerLayout, StreamLayout
from attnres_compile.module import live_owner, live_owners
from attnres_compile.passes.find_streams import find_streams
from attnres_compile.passes.graph_values import module_path
from attnres_compile.passes.identify_additions import identify_additions
from attnres_compile.passes.loops import loops_behind
from attnres_compile.passes.redirect_reads import redirect_reads
from attnres_compile.passes.rewrite_deltas import deltas_first, rewrite_deltas
from attnres_compile.passes.rewrite_residuals import rewrite_residuals
from attnres_compile.passes.streams import ResidualStream


@dataclass(frozen=True)
class _Marker:
    """A declaration found in a graph."""

    node: fx.Node
    layout: OwnerLayout
    parameters: tuple[fx.Node, ...]


@dataclass(frozen=True)
class _Match:
    """A stream of this graph and the layout and parameters it is to be rewritten with."""

    stream: ResidualStream
    layout: StreamLayout
    parameters: dict[int, tuple[fx.Node, fx.Node | None]]


def rewrite_dynamo_graph(module: fx.GraphModule, owner: nn.Module | None) -> int:
    """Rewrites a graph from Dynamo in place, at every marker in it.

    Args:
        module: torch-level graph.
        owner: the module whose forward the graph is, if it is one's own forward; owners called
            inside are found by their module stacks.

    Returns:
        How many markers there were; 0 leaves the graph as it was.

    Raises:
        MismatchError: the graph does not hold exactly the sites of the plan.
    """
    open_bodies(module)

    def enter(marker: fx.Node) -> Callable[[fx.Node], bool]:
        stack = marker.meta.get("nn_module_stack") or {}
        for key in reversed(stack):
            inner = live_owner(int(key.split("@")[0])) if key.split("@")[0].isdigit() else None
            if inner is not None:
                annotate_dynamo(module, inner)
                return _inside(key)
        around = owner or _owner_of(module, str(marker.args[1]))
        if around is None:
            raise MismatchError(
                "this graph holds a part of a converted model whose call is not in it: another "
                "method than forward was called (call it outside of torch.compile), or the graph "
                "breaks within the model (compile with fullgraph=True, which says where)."
            )
        annotate_dynamo(module, around)
        return _inside("")

    return _rewrite(module, enter)


def rewrite_export_graph(module: fx.GraphModule) -> int:
    """Rewrites a graph from torch.export in place, at every marker; returns how many there were."""

    def enter(marker: fx.Node) -> Callable[[fx.Node], bool]:
        stack = marker.meta.get("nn_module_stack") or {}
        key = next(reversed(stack), "")
        path = stack[key][0].split("@")[0] if key else ""
        annotate_export(module, below=path)
        return _inside(key)

    return _rewrite(module, enter)


def _owner_of(module: fx.GraphModule, layout: str) -> nn.Module | None:
    """The owner whose own forward a whole graph is: it called these modules, by this layout.

    That is ``torch.compile(converted)`` where the model itself is the owner, which Dynamo enters
    without a call of it. Nothing where the graph holds parts of several models.
    """
    keys = {k for node in module.graph.nodes for k in node.meta.get("nn_module_stack") or {}}
    called = {key.split("@")[0] for key in keys}
    fitting = [o for o in live_owners() if o.attnres.encoded_layout == layout]
    parts = {o: frozenset(called & {str(id(m)) for m in o.modules()}) for o in fitting}
    owners = [owner for owner, part in parts.items() if part]
    # owners with the same parts were converted from one model
    return owners[0] if len({parts[owner] for owner in owners}) == 1 else None


def _inside(call: str) -> Callable[[fx.Node], bool]:
    """Whether a node was traced inside a module call; every node is inside the call ``""``."""
    return lambda node: not call or call in (node.meta.get("nn_module_stack") or {})


def _rewrite(module: fx.GraphModule, enter: Callable[[fx.Node], Callable[[fx.Node], bool]]) -> int:
    graph = module.graph
    markers = [node for node in graph.nodes if node.target is torch.ops.attnres.declare.default]
    declared = [_read(node) for node in markers if node.args[1]]
    if not declared and markers:
        raise MismatchError(
            "only a part of a converted model was captured: its Attention Residuals belong to the "
            "module around it; compile or export that module."
        )
    if not declared:
        return 0
    outermost = [m for i, m in enumerate(declared) if not any(_within(m, o) for o in declared[:i])]
    plain: tuple[ResidualStream, ...] = ()
    if any(not marker.layout.delta_sources for marker in outermost):
        plain = find_streams(graph).streams
    streams = plain
    matches: list[_Match] = []
    for marker in outermost:
        inside = enter(marker.node)
        found = plain
        if marker.layout.delta_sources:
            # A chain of this owner may go on outside, which was not there when it was planned.
            found = find_streams(graph, delta_sources=True, within=inside).streams
            streams += found
        matches += _matched(marker, found, inside)
    _check_no_second_call([m.node for m in declared if m not in outermost], streams, matches)
    # New nodes get example values; saved-tensor hooks of the user's are not to see these.
    with torch.no_grad():
        redirect_reads(graph, streams)
        for match in deltas_first(matches, lambda match: match.stream.deltas):
            rewrite = rewrite_deltas if match.stream.deltas else rewrite_residuals
            rewrite(graph, match.stream, match.layout.mix, match.parameters)
    for node in markers:
        graph.erase_node(node)
    graph.lint()
    module.recompile()
    return len(outermost)


def _within(marker: _Marker, outer: _Marker) -> bool:
    """Whether a method declared once more what the call around it had declared."""
    calls, calls_around = (m.node.meta.get("nn_module_stack") or {} for m in (marker, outer))
    return marker.parameters == outer.parameters and set(calls_around) <= set(calls)


def _check_no_second_call(
    inner: list[fx.Node], streams: tuple[ResidualStream, ...], matches: list[_Match]
) -> None:
    """A method that declares after the stream is through, and runs it again, was not within."""
    rewritten = {id(match.stream) for match in matches}
    rest = [stream for stream in streams if id(stream) not in rewritten]
    ambiguous = len(rewritten) < len(matches)
    for node in inner:
        through = [_layers(m.stream) for m in matches if m.stream.additions[-1].node < node]
        again = (s for s in rest if node < s.additions[0].node)
        ambiguous = ambiguous or any(_layers(stream) in through for stream in again)
    if ambiguous:
        raise MismatchError(
            "a method of a converted model is called more than once in this graph, and its calls "
            "cannot be told apart; call it outside of torch.compile."
        )


def _layers(stream: ResidualStream) -> list[str]:
    return [module_path(addition.node) for addition in stream.additions]


def _read(node: fx.Node) -> _Marker:
    parameters, text = node.args
    assert isinstance(parameters, list | tuple)
    assert isinstance(text, str)
    return _Marker(node, OwnerLayout.decode(text), tuple(parameters))  # type: ignore[arg-type]


def _matched(
    marker: _Marker,
    streams: tuple[ResidualStream, ...],
    inside: Callable[[fx.Node], bool],
) -> list[_Match]:
    own = [s for s in streams if all(inside(addition.node) for addition in s.additions)]
    identities = identify_additions(own)
    by_additions = {tuple(identities[a.node] for a in stream.additions): stream for stream in own}
    matches = []
    remaining = iter(marker.parameters)
    for layout in marker.layout.streams:
        stream = by_additions.get(layout.additions)
        if stream is None:
            raise _mismatch(layout, list(by_additions), loops_behind(marker.node.graph))
        _check_sites(stream, layout)
        parameters = {
            state: (next(remaining), next(remaining) if layout.gains else None)
            for state in layout.sites
        }
        matches.append(_Match(stream, layout, parameters))
    return matches


def _check_sites(stream: ResidualStream, layout: StreamLayout) -> None:
    found = {i for i, state in enumerate(stream.states) if state.reads and i > 0}
    planned = {*layout.sites, *layout.left_out}
    if found == planned:
        return
    state = stream.states[min(found ^ planned)]
    raise MismatchError(
        f"stream {layout.name!r} is read at other depths here than in the plan (first at depth "
        f"{state.depth}, in {module_path(state.node) or 'the owner'}); plan it with example "
        "inputs that take the same path through the model."
    )


def _mismatch(
    layout: StreamLayout, found: list[tuple[tuple[str, int], ...]], loops: list[str]
) -> MismatchError:
    expected = len(layout.additions)
    closest = max(found, key=lambda f: len(set(f) & set(layout.additions)), default=())
    missing = [i for i in layout.additions if i not in closest][:1]
    extra = [i for i in closest if i not in layout.additions][:1]
    detail = "".join(
        f"; {word} the addition {ordinal} of {path or 'the owner'}"
        for word, ids in (("without", missing), ("with", extra))
        for path, ordinal in ids
    )
    repeated = (
        f" (Where {' or '.join(loops)} runs as often as an input is long, every length is another "
        "path: such a loop cannot be converted.)"
    )
    return MismatchError(
        f"stream {layout.name!r}: the plan has {expected} residual additions, this call of the "
        f"model has {len(closest)}{detail}. Plan it with example inputs that take the same path "
        "through the model, and keep layers switched on that the plan knows. (Where the stream "
        "starts from a parameter that is broadcast over the batch, batches of one are another "
        "path: plan with a batch of several.)" + (repeated if loops else "")
    )
