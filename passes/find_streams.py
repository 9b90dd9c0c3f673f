"""Find the residual streams of a graph: which additions carry them, and which only look like it.

Rules, in the order they are applied (design vocabulary in brackets):

1. A *candidate* is a floating-point addition whose skip operand has the result's shape.
2. A candidate is a *residual addition* if its branch depends, through an operation that is not
   element-wise, on the root of the chain its skip operand is a state of. So positional and rotary
   embeddings, masks, biases, GELU's polynomial, low-rank sums and state-space scans are none.
3. An addition of something that does not depend on the chain is *absorbed*: mid-chain, and before
   the first residual addition where that one's branch reads what was there before it.
4. Where a state has several successors, the one that depends on all others (an outer skip) goes
   on with the chain, or else the longest; the others start streams of their own at that state.
5. A transposition of the carrier is seen through where that joins too short a chain (`layouts`).
6. A stream needs two *sublayers*: with one there is nothing to choose from.

Nothing is dropped in silence: a residual addition is in a stream or in a `Refusal`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from attnres_compile.passes import operations as ops
from attnres_compile.passes.dataflow import Dataflow, Read, Reads
from attnres_compile.passes.explain_bodies import explain_bodies
from attnres_compile.passes.explain_refusals import (
    explain_altered_skips,
    explain_fused_additions,
    explain_fused_layers,
    explain_mixed_streams,
    explain_own_factors,
    explain_short_chains,
    offer_deltas,
)
from attnres_compile.passes.find_delta_streams import DeltaChains
from attnres_compile.passes.graph_values import dtype_of, module_path, shape_of, source_line
from attnres_compile.passes.layouts import Turns, joining_turns, turns_after
from attnres_compile.passes.streams import (
    Addition,
    Refusal,
    ResidualStream,
    State,
    StreamAnalysis,
    sublayers_of,
)


def find_streams(
    graph: fx.Graph,
    *,
    delta_sources: bool = False,
    within: Callable[[fx.Node], bool] = lambda _: True,
) -> StreamAnalysis:
    """Finds every residual stream of a torch-level, ATen or symbolically traced graph.

    Args:
        graph: nodes need example values (shapes and dtypes); module calls and stack traces are
            used for reports where present. The graph is not changed.
        delta_sources: find the streams too whose carrier is altered between additions
            (`find_delta_streams`). Chains that such alterations interrupt become one stream.
        within: where alterations may join chains: in a graph of several models, inside one.

    Returns:
        The streams in graph order, outer ones before the ones nested in them, and the refusals.
    """
    view = Dataflow.of(graph)
    found = _find(view, Reads(view), delta_sources, within)
    turns = joining_turns(view, found.reads, found.plain)
    if turns:
        found = _find(view, Reads(view, turns), delta_sources, within)
    refused = found.refused
    if refused and not delta_sources:
        refused = offer_deltas(refused, find_streams(graph, delta_sources=True).streams)
    others = explain_fused_additions(view, found.reads) + explain_fused_layers(view)
    others += explain_bodies(graph, _number_of_additions)
    return StreamAnalysis(tuple(found.streams), (*refused.values(), *others))


@dataclass(frozen=True)
class _Found:
    """What was found with some turns seen through.

    Attributes:
        reads: by which values were looked up.
        streams, refused: the result.
        plain: all chains without alteration, those too short to be a stream too.
    """

    reads: Reads
    streams: list[ResidualStream]
    refused: dict[fx.Node, Refusal]
    plain: list[ResidualStream]


def _find(
    view: Dataflow, reads: Reads, delta_sources: bool, within: Callable[[fx.Node], bool]
) -> _Found:
    candidates = [node for node in view.order if _is_candidate(node)]
    accepted = _accepted_additions(view, reads, candidates)
    refused = explain_own_factors(accepted.values())
    accepted = {node: addition for node, addition in accepted.items() if node not in refused}
    deltas = DeltaChains(view, reads, accepted, within)
    additions = deltas.linked(candidates) if delta_sources else list(accepted.values())
    chains = _split_into_chains(view, additions)
    if delta_sources:
        chains = _outer_first(view, [deltas.at_own_root(chain) for chain in chains])
    streams: list[ResidualStream] = []
    plain: list[ResidualStream] = []
    short: list[list[Addition]] = []
    for chain in chains:
        delta = deltas.stream_of(chain) if delta_sources else None
        stream = _stream_of(chain, reads) if delta is None else delta
        plain += [stream] if delta is None and stream.sublayers else []
        if len(stream.sublayers) < 2:
            short.append(chain)
        elif (written := _overwritten_source(view, reads, stream)) is not None:
            refused |= {a.node: _overwritten_refusal(a, written) for a in stream.additions}
        else:
            streams.append(stream)
    known = {addition.node for addition in additions}
    known |= {node for s in streams if s.deltas for node in deltas.passed(s)}
    altered = explain_altered_skips(view, reads, [n for n in candidates if n not in known])
    refused |= explain_short_chains(reads, short, chains, altered, delta_sources=delta_sources)
    refused |= altered
    refused |= explain_mixed_streams(view, reads, [n for n in candidates if n not in known])
    return _Found(reads, streams, refused, plain)


def _number_of_additions(graph: fx.Graph) -> int:
    """How many additions of a graph are residual, converted or refused."""
    found = find_streams(graph)
    return sum(len(stream.additions) for stream in found.streams) + len(found.refusals)


def _accepted_additions(
    view: Dataflow, reads: Reads, candidates: list[fx.Node]
) -> dict[fx.Node, Addition]:
    """Rules 2 and 3: residual additions and absorbed ones, by their node, in graph order."""
    roots = {
        reads.value_read(operand, node): None
        for node in candidates
        for operand in ops.operands(node)
    }
    bit, any_path, mixing_path = view.dependency_masks(roots)
    accepted: dict[fx.Node, Addition] = {}
    root_of: dict[fx.Node, fx.Node] = {}
    beside: dict[fx.Node, list[Addition]] = {}  # such as x + t, where no chain is known at x so far

    def root(value: fx.Node) -> fx.Node:
        return root_of.get(value, value)

    def from_the_side(addition: Addition, state: Addition) -> bool:
        """Whether the skip is a value that only came to the chain of the other operand later."""
        other, start = addition.previous, root(state.previous)
        return other not in accepted and other is not start and not any_path[start] & bit[other]

    for node in candidates:
        residual: list[Addition] = []
        absorbed: list[Addition] = []
        late: list[list[Addition]] = []  # each with what was added from the side before it
        beside[node] = []
        for position in _skip_positions(node):
            operands = ops.operands(node)
            previous = reads.value_read(operands.pop(position), node)
            depends = [reads.value_read(part, node) for part in operands]
            whole = any(shape_of(part) == shape_of(node) for part in operands)
            mixed = any(mixing_path[part] & bit[root(previous)] for part in depends)
            addition = Addition(node, previous, position, is_residual=mixed and whole)
            if addition.is_residual:
                residual.append(addition)
            elif not any(any_path[part] & bit[root(previous)] for part in depends):
                (absorbed if previous in accepted else beside[node]).append(addition)
                passed = _side_additions(previous, beside)
                late += [
                    [replace(addition, is_residual=True), *way]
                    for value, way in passed.items()
                    if whole and any(mixing_path[part] & bit[root(value)] for part in depends)
                ]
        # What independent sums mean is settled by the residual reading where there is one.
        if absorbed and all(from_the_side(addition, absorbed[0]) for addition in residual):
            chosen = absorbed[:1]
        elif residual:  # An outer skip is the operand that was made first.
            chosen = [min(residual, key=lambda addition: view.order[addition.previous])]
        else:
            chosen = min(late, key=len, default=[])
        for addition in reversed(chosen):
            accepted[addition.node] = addition
            root_of[addition.node] = root(addition.previous)
    return dict(sorted(accepted.items(), key=lambda item: view.order[item[0]]))


def _side_additions(
    value: fx.Node, beside: Mapping[fx.Node, Sequence[Addition]]
) -> dict[fx.Node, list[Addition]]:
    """What a value was before something was added from the side; with these additions, last first.

    In ``(x + t) + f(x)`` the branch does not depend on ``x + t``, but on what that was before.
    """
    found: dict[fx.Node, list[Addition]] = {value: []}
    pending = [value]
    for current in pending:
        for addition in beside.get(current, ()):
            if addition.previous not in found:
                found[addition.previous] = [*found[current], addition]
                pending.append(addition.previous)
    del found[value]
    return found


def _is_candidate(node: fx.Node) -> bool:
    if not ops.is_addition(node) or len(ops.operands(node)) < 2:
        return False
    return dtype_of(node).is_floating_point and len(shape_of(node)) >= 2


def _skip_positions(node: fx.Node) -> list[int]:
    """Which operands of an addition may be its skip: of the result's shape, and not scaled."""
    operands = ops.operands(node)
    first_only = ops.operation(node) != "add" or ops.argument(node, 2, "alpha", 1) != 1
    positions = [0] if first_only else [0, 1]
    return [position for position in positions if shape_of(operands[position]) == shape_of(node)]


def _split_into_chains(view: Dataflow, additions: list[Addition]) -> list[list[Addition]]:
    """Rule 4: a tree of additions becomes chains, each state with one successor."""
    successors: dict[fx.Node, list[Addition]] = defaultdict(list)
    for addition in additions:
        successors[addition.previous].append(addition)
    length: dict[fx.Node, int] = {}
    for addition in reversed(additions):
        onward = [length[after.node] for after in successors[addition.node]]
        length[addition.node] = int(addition.is_residual) + max(onward, default=0)
    for value, options in successors.items():
        successors[value] = [option for option in options if length[option.node] > 0]

    chains = []
    taken: set[fx.Node] = set()
    for addition in additions:
        if addition.node in taken or addition not in successors[addition.previous]:
            continue
        chain = [addition]
        while successors[chain[-1].node]:
            chain.append(_continuation(view, successors[chain[-1].node], length))
        taken.update(step.node for step in chain)
        chains.append(chain)
    return _outer_first(view, chains)


def _continuation(view: Dataflow, options: list[Addition], length: dict[fx.Node, int]) -> Addition:
    if len(options) == 1:
        return options[0]
    last = options[-1]
    if all(_depends(view, last.node, other.node) for other in options[:-1]):
        return last
    return max(options, key=lambda option: length[option.node])


def _depends(view: Dataflow, node: fx.Node, on: fx.Node) -> bool:
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current is on:
            return True
        for source in view.flow.predecessors(current):
            if source not in seen and view.order[source] >= view.order[on]:
                seen.add(source)
                pending.append(source)
    return False


def _outer_first(view: Dataflow, chains: list[list[Addition]]) -> list[list[Addition]]:
    """Chains in the order of their roots; of two with one root, the one that ends later first."""
    return sorted(
        chains, key=lambda chain: (view.order[chain[0].previous], -view.order[chain[-1].node])
    )


def _stream_of(chain: list[Addition], reads: Reads) -> ResidualStream:
    """States with their reads; trailing additions that nothing reads are left out."""
    states = [State(chain[0].skip, 0, _reads_of(chain[0].previous, chain[0], reads), None)]
    depth = 0
    turns: Turns = ()
    for position, addition in enumerate(chain):
        depth += int(addition.is_residual)
        if position > 0:
            turns = turns_after(turns, reads.turns_above(addition.skip))
        successor = chain[position + 1] if position + 1 < len(chain) else None
        found = _reads_of(addition.node, successor, reads)
        states.append(State(addition.node, depth, found, addition, turns=turns))
    while len(states) > 1 and not states[-1].reads:
        states.pop()
    return ResidualStream(tuple(states), sublayers_of(states))


def _reads_of(value: fx.Node, successor: Addition | None, reads: Reads) -> tuple[Read, ...]:
    found = reads.of(value)
    if successor is None:
        return tuple(found)
    return tuple(
        read
        for read in found
        if not (read.user is successor.node and read.operand is successor.skip)
    )


def _overwritten_source(view: Dataflow, reads: Reads, stream: ResidualStream) -> fx.Node | None:
    """A write in place that mixes could not follow.

    Either one into a source (the root or a branch), other than by a residual addition or a reader
    that will write into its mix; or a residual addition whose result is read through an older
    view of another shape than a state's (a slice, a transposition).
    """
    if stream.deltas:
        return _overwritten_state(view, stream) or _state_read_through_view(reads, stream)
    first = stream.chain[0]
    # What was written before the stream starts is a part of its root.
    writes = view.writes_between(first.skip, start=first.previous)
    for state in stream.states[1:]:
        assert state.addition is not None
        for part in state.addition.branch:
            writes += view.writes_between(part, start=state.node)
    own = {state.node for state in stream.states[1:]}
    for written in writes:
        if written not in own and not _writes_into_mix(view, reads, stream, written):
            return written
    return _state_read_through_view(reads, stream)


def _overwritten_state(view: Dataflow, stream: ResidualStream) -> fx.Node | None:
    """A write into a state that later differences are taken from: the root, or one that is read."""
    root = stream.states[0].node
    start = stream.chain[0].previous if stream.chain else root
    writes = view.writes_between(root, start=max(root, start))
    for state in stream.states[1:]:
        if state.reads:
            writes += view.writes_between(state.node, start=state.node)
            writes += [read.user for read in state.carries if _goes_on_by_name(state.node, read)]
    return writes[0] if writes else None


def _goes_on_by_name(state: fx.Node, carry: Read) -> bool:
    """Whether the carrier is copied, the copy written into, and taken on by the copy's name."""
    path = Dataflow.path_to_origin(carry.operand)
    if ops.writes_into(carry.user) is None or state not in path:
        return False
    way = path[: path.index(state)]
    return any(user is not carry.user and user not in way for node in way for user in node.users)


def _writes_into_mix(
    view: Dataflow, reads: Reads, stream: ResidualStream, written: fx.Node
) -> bool:
    """Whether a write and all who read its result come by a state, in whose place a mix stands.

    Names older than the state lead to the memory of its root or branch, as it was before.
    """
    states = [s.node for s in stream.states[1:] if view.order[s.node] < view.order[written]]
    if not states:
        return False
    later = [read.operand for read in reads.of(written)]
    if all(read.user is not written for state in stream.states[1:] for read in state.reads):
        later.append(ops.writes_into(written) or written)
    return all(view.order[operand] >= view.order[states[-1]] for operand in later)


def _state_read_through_view(reads: Reads, stream: ResidualStream) -> fx.Node | None:
    targets = [ops.writes_into(state.node) or state.node for state in stream.states]
    whole = {reads.origin(node) for node in targets} | {state.node for state in stream.states}
    for state in stream.states[1:]:
        if any(reads.origin(read.operand) not in whole for read in state.reads):
            return state.node
    return None


def _overwritten_refusal(addition: Addition, written: fx.Node) -> Refusal:
    line = source_line(written) or "an unknown line"
    return Refusal(
        "overwritten",
        f"the stream is overwritten in place by {ops.operation(written)!r} at {line}; make that "
        "operation out of place",
        module_path(addition.node),
        source_line(addition.node),
        addition.node.name,
    )
