"""Find the residual streams of a graph: which additions carry them, and which only look like it.

Rules, in the order they are applied (design vocabulary in brackets):

1. A *candidate* is a floating-point addition whose skip operand has the result's shape.
2. A candidate is a *residual addition* if its branch depends, through an operation that is not
   element-wise, on the root of the chain its skip operand is a state of. So positional and rotary
   embeddings, masks, biases, GELU's polynomial, low-rank sums and state-space scans are none.
3. A mid-chain addition of something that does not depend on the chain is *absorbed*.
4. Where a state has several successors, the one that depends on all others (an outer skip) goes
   on with the chain, or else the longest; the others start streams of their own at that state.
5. A stream needs two *sublayers*: with one there is nothing to choose from.

Nothing is dropped in silence: a residual addition is in a stream or in a `Refusal`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from torch import fx

from attnres_compile.passes import operations as ops
from attnres_compile.passes.dataflow import Dataflow
from attnres_compile.passes.graph_values import (
    dtype_of,
    module_path,
    shape_of,
    source_line,
)


@dataclass(frozen=True)
class Addition:
    """One addition ``node = skip + branch`` of a chain.

    Attributes:
        node: the addition; its value is the next state of the stream.
        previous: the node that made the state (or root) which the skip operand carries.
        skip_position: which of the addition's tensor operands the skip is.
        is_residual: False for an absorbed addition, whose branch is independent of the stream.
    """

    node: fx.Node
    previous: fx.Node
    skip_position: int
    is_residual: bool

    @property
    def skip(self) -> fx.Node:
        """The skip operand as it stands in the call now."""
        return ops.operands(self.node)[self.skip_position]

    @property
    def branch(self) -> tuple[fx.Node, ...]:
        """The other operands: one, or the two factors of an ``addcmul``."""
        found = ops.operands(self.node)
        return tuple(found[: self.skip_position] + found[self.skip_position + 1 :])


@dataclass(frozen=True)
class Read:
    """A use of a state by anything but the skip of the next state."""

    user: fx.Node
    operand: fx.Node


@dataclass(frozen=True)
class State:
    """A state of a stream: the root, or the value after an addition.

    Attributes:
        node: what made it; for the root, the skip operand of the first addition.
        depth: how many residual additions precede it.
        reads: its uses other than the skip of the next state; a state with reads is a site.
        addition: the addition that made it; None for the root alone.
    """

    node: fx.Node
    depth: int
    reads: tuple[Read, ...]
    addition: Addition | None


@dataclass(frozen=True)
class ResidualStream:
    """A chain of residual additions, as it stands in one graph.

    Attributes:
        states: root first; the last one is read.
        sublayers: for each sublayer, the residual additions it sums.
    """

    states: tuple[State, ...]
    sublayers: tuple[tuple[Addition, ...], ...]

    @property
    def additions(self) -> tuple[Addition, ...]:
        """The residual additions, without the absorbed ones."""
        return tuple(addition for sublayer in self.sublayers for addition in sublayer)

    @property
    def sites(self) -> tuple[State, ...]:
        return tuple(state for state in self.states if state.reads)


@dataclass(frozen=True)
class Refusal:
    """A residual-looking addition that is not converted.

    Attributes:
        kind: a word for the reason: post-norm, post-activation, single-sublayer, ...
        reason: one sentence for a person.
        module_path: the module the addition was traced in.
        source: its source line, ``file.py:123``.
    """

    kind: str
    reason: str
    module_path: str
    source: str


@dataclass(frozen=True)
class StreamAnalysis:
    """What one graph holds: the streams that can be converted, and what was refused."""

    streams: tuple[ResidualStream, ...]
    refusals: tuple[Refusal, ...]


def find_streams(graph: fx.Graph) -> StreamAnalysis:
    """Finds every residual stream of a torch-level, ATen or symbolically traced graph.

    Args:
        graph: nodes need example values (shapes and dtypes); module calls and stack traces are
            used for reports where present. The graph is not changed.

    Returns:
        The streams in graph order, outer ones before the ones nested in them, and the refusals.
    """
    view = Dataflow.of(graph)
    reads = _Reads(view)
    chains = _split_into_chains(view, _accepted_additions(view, reads))
    streams: list[ResidualStream] = []
    short: list[list[Addition]] = []
    refusals: list[Refusal] = []
    for chain in chains:
        stream = _stream_of(chain, reads)
        written = _overwritten_state(view, stream)
        if len(stream.sublayers) < 2:
            short.append(chain)
        elif written is not None:
            refusals += [_overwritten_refusal(addition, written) for addition in stream.additions]
        else:
            streams.append(stream)
    refusals += _explain_short_chains(view, reads, short)
    return StreamAnalysis(tuple(streams), tuple(refusals))


class _Reads:
    """Who reads which value, with in-place writes taken into account."""

    def __init__(self, view: Dataflow) -> None:
        self._view = view
        self._origins: dict[fx.Node, fx.Node] = {}
        self._by_value: dict[fx.Node, list[Read]] = defaultdict(list)
        for user in view.order:
            for operand in ops.tensor_arguments(user):
                self._by_value[self.value_read(operand, user)].append(Read(user, operand))

    def origin(self, node: fx.Node) -> fx.Node:
        if node not in self._origins:
            self._origins[node] = self._view.origin(node)
        return self._origins[node]

    def value_read(self, operand: fx.Node, user: fx.Node) -> fx.Node:
        """The node whose value `user` sees in `operand`: its origin, or who overwrote it since."""
        origin = self.origin(operand)
        value = origin
        for writer in self._view.writers.get(self._view.memory.get(operand, operand), ()):
            if self._view.order[origin] < self._view.order[writer] < self._view.order[user]:
                value = writer
        return value

    def of(self, value: fx.Node) -> list[Read]:
        """The reads of a value, not counting the copies, casts and views that only carry it on."""
        return [
            read
            for read in self._by_value[value]
            if read.user is not value and self.origin(read.user) is not self.origin(value)
        ]


def _accepted_additions(view: Dataflow, reads: _Reads) -> list[Addition]:
    """Rules 1 to 3: residual additions and absorbed ones, in graph order."""
    candidates = [node for node in view.order if _is_candidate(node)]
    roots = {
        reads.value_read(operand, node): None
        for node in candidates
        for operand in ops.operands(node)
    }
    bit, any_path, mixing_path = view.dependency_masks(roots)
    accepted: dict[fx.Node, Addition] = {}
    root_of: dict[fx.Node, fx.Node] = {}

    def root(value: fx.Node) -> fx.Node:
        return root_of.get(value, value)

    for node in candidates:
        options = []
        for position in _skip_positions(node):
            operands = ops.operands(node)
            previous = reads.value_read(operands.pop(position), node)
            chain_bit = bit[root(previous)]
            depends = [reads.value_read(part, node) for part in operands]
            residual = any(mixing_path[part] & chain_bit for part in depends)
            independent = not any(any_path[part] & chain_bit for part in depends)
            if residual and shape_of(operands[0]) == shape_of(node):
                options.append(Addition(node, previous, position, is_residual=True))
            elif independent and previous in accepted:
                options.append(Addition(node, previous, position, is_residual=False))
        if not options:
            continue
        # An outer skip is the operand that was made first; what independent sums mean is settled
        # by the residual reading where there is one.
        chosen = min(options, key=lambda a: (not a.is_residual, view.order[a.previous]))
        accepted[node] = chosen
        root_of[node] = root(chosen.previous)
    return list(accepted.values())


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


def _stream_of(chain: list[Addition], reads: _Reads) -> ResidualStream:
    """States with their reads; trailing additions that nothing reads are left out."""
    states = [State(chain[0].skip, 0, _reads_of(chain[0].previous, chain[0], reads), None)]
    depth = 0
    for position, addition in enumerate(chain):
        depth += int(addition.is_residual)
        successor = chain[position + 1] if position + 1 < len(chain) else None
        found = _reads_of(addition.node, successor, reads)
        states.append(State(addition.node, depth, found, addition))
    while len(states) > 1 and not states[-1].reads:
        states.pop()
    return ResidualStream(tuple(states), _sublayers(states))


def _reads_of(value: fx.Node, successor: Addition | None, reads: _Reads) -> tuple[Read, ...]:
    found = reads.of(value)
    if successor is None:
        return tuple(found)
    return tuple(
        read
        for read in found
        if not (read.user is successor.node and read.operand is successor.skip)
    )


def _sublayers(states: list[State]) -> tuple[tuple[Addition, ...], ...]:
    sublayers: list[list[Addition]] = [[]]
    for state in states[1:]:
        assert state.addition is not None
        if state.addition.is_residual:
            sublayers[-1].append(state.addition)
        if state.reads and sublayers[-1]:
            sublayers.append([])
    return tuple(tuple(sublayer) for sublayer in sublayers if sublayer)


def _overwritten_state(view: Dataflow, stream: ResidualStream) -> fx.Node | None:
    """An in-place write, other than a residual addition, into what a source would be made of."""
    own = {state.node for state in stream.states}
    for before, after in zip(stream.states, stream.states[1:], strict=False):
        written = view.overwritten_between(before.node, after.node)
        if written is not None and written not in own:
            return written
    root = stream.states[0].node
    written = view.overwritten_between(root, None)
    return written if written is not None and written not in own else None


def _overwritten_refusal(addition: Addition, written: fx.Node) -> Refusal:
    return _refusal(
        addition,
        "overwritten",
        f"the stream is overwritten in place by {ops.operation(written)!r} at "
        f"{source_line(written) or 'an unknown line'}; make that operation out of place",
    )


def _explain_short_chains(
    view: Dataflow, reads: _Reads, chains: list[list[Addition]]
) -> list[Refusal]:
    """Why chains of fewer than two sublayers are no streams: what interrupts the carrier."""
    ends = {chain[-1].node: position for position, chain in enumerate(chains)}
    interrupted: dict[int, str] = {}
    for position, chain in enumerate(chains):
        crossed, end = _walk_up_to_state(chain[0].previous, reads, set(ends))
        if end is None or not crossed:
            continue
        interrupted[position] = interrupted[ends[end]] = _interruption(crossed)
    refusals = []
    for position, chain in enumerate(chains):
        kind = interrupted.get(position, "single-sublayer")
        refusals += [_refusal(step, kind, _REASONS[kind]) for step in chain if step.is_residual]
    return refusals


_REASONS = {
    "post-norm": "post-norm: the carrier passes a norm between residual additions, so block sums "
    "do not add up to it",
    "post-activation": "post-activation: the carrier passes an activation between residual "
    "additions, so block sums do not add up to it",
    "dropout": "the carrier passes dropout between residual additions; dropout belongs on the "
    "branch",
    "narrowing-cast": "the carrier passes a narrowing cast between residual additions, which "
    "changes its value; keep the stream in one dtype",
    "scaled-carrier": "the carrier is scaled between residual additions, so block sums do not add "
    "up to it",
    "changed-carrier": "the carrier is changed between residual additions, so block sums do not "
    "add up to it",
    "single-sublayer": "a stream of one sublayer has nothing to choose from",
}
_LONGEST_INTERRUPTION = 16  # nodes; the longest decomposed norm seen has 11


def _walk_up_to_state(
    node: fx.Node, reads: _Reads, ends: set[fx.Node]
) -> tuple[list[fx.Node], fx.Node | None]:
    """From a root back, over same-shaped element-wise nodes and norms, to the end of a chain."""
    crossed: list[fx.Node] = []
    current = node
    for _ in range(_LONGEST_INTERRUPTION):
        if reads.origin(current) in ends:
            return crossed, reads.origin(current)
        if not (ops.is_elementwise(current) or ops.operation(current) in ops.NORMS):
            return crossed, None
        crossed.append(current)
        same = [a for a in ops.tensor_arguments(current) if shape_of(a) == shape_of(node)]
        if not same:
            return crossed, None
        current = same[0] if len(same) == 1 else max(same, key=lambda a: len(a.users))
    return crossed, None


def _interruption(crossed: list[fx.Node]) -> str:
    names = {ops.operation(node) for node in crossed}
    if names & ops.NORMS or any(_multiplies_by_statistic(node) for node in crossed):
        return "post-norm"
    if names & ops.ACTIVATIONS:
        return "post-activation"
    if names & ops.DROPOUTS:
        return "dropout"
    if any(ops.operation(n) in ops.CASTS and not ops.is_value_preserving(n) for n in crossed):
        return "narrowing-cast"
    return "scaled-carrier" if names & {"mul", "div"} else "changed-carrier"


def _multiplies_by_statistic(node: fx.Node) -> bool:
    """The last step of a decomposed norm: the carrier times an inverse root mean square."""
    if ops.operation(node) not in ("mul", "div"):
        return False
    makers = {ops.operation(part) for part in ops.tensor_arguments(node)}
    return bool(makers & {"rsqrt", "sqrt", "std", "linalg_vector_norm", "norm", "reciprocal"})


def _refusal(addition: Addition, kind: str, reason: str) -> Refusal:
    return Refusal(kind, reason, module_path(addition.node), source_line(addition.node))
