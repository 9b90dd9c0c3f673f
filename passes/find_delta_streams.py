"""Find the streams whose carrier is altered between additions: post-norm, post-activation, scaled.

In ``y_k = N(y_(k-1) + b_k)`` (BERT, the original Transformer), in ``relu(y + f(y))`` (ResNet) and
in ``N(alpha * y + f(y))`` (DeepNorm) the branches do not add up to the state. Differences of states
do, whatever happens in between: ``y_0 + (y_i - y_0) + (y_k - y_i) = y_k``. So these chains have
*delta sources*: the root ``y_0`` and, for each block, what it changed about the state.

The chain itself is computed as before: its states ``y_k`` come from the original operations, with
the state before on the skip (the *carrier*) and with branches that read mixes. Rules, after
`find_streams` has found what is a residual addition by its own:

1. ``g(x) + f(x)`` is one too, where g scales, drops out or rounds, and f(x) depends on x, or on an
   earlier state of its chain, through a matrix product or convolution.
2. An addition goes on with the last one before it from which its skip comes through an
   `Alteration`: element-wise operations and norms that keep every element in its place, and whose
   inner values nobody else reads. A plain successor goes before an altered one.
3. Values that the carrier takes on the way are states of the stream where they are read.
4. What follows the last addition belongs to the stream if it is what followed an earlier one, up
   to its first read, inside the same module call.

A chain without any alteration is a plain stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from attnres_compile.passes import operations as ops
from attnres_compile.passes.alterations import (
    Alteration,
    alteration_between,
    keeps_form,
    num_elements,
    scales_operand,
    walk_up_alterations,
)
from attnres_compile.passes.dataflow import Dataflow, Read, Reads
from attnres_compile.passes.graph_values import ModuleCall, is_tensor, module_calls, shape_of
from attnres_compile.passes.streams import Addition, ResidualStream, State, sublayers_of

_LONGEST_ALTERATION = 24  # nodes; an activation and the longest decomposed norm


@dataclass(frozen=True)
class DeltaChains:
    """Links additions over the alterations between them, and makes streams of the chains.

    Attributes:
        view, reads: of the graph.
        accepted: residual and absorbed additions by the rules of `find_streams`, in graph order.
        within: whether a node lies where chains may be linked.
    """

    view: Dataflow
    reads: Reads
    accepted: Mapping[fx.Node, Addition]
    within: Callable[[fx.Node], bool]

    def linked(self, candidates: Sequence[fx.Node]) -> list[Addition]:
        """All additions in graph order, each with the one before it that it goes on with."""
        known = {**self.accepted, **self._scaled(candidates)}
        additions = [known[node] for node in candidates if node in known]
        continued = _with_plain_successor(additions)
        return [self._linked(addition, known, continued) for addition in additions]

    def at_own_root(self, chain: Sequence[Addition]) -> list[Addition]:
        """A chain of linked additions, starting anew where what came before went on elsewhere."""
        first = chain[0]
        return [self.accepted.get(first.node, first), *chain[1:]]

    def stream_of(self, chain: Sequence[Addition]) -> ResidualStream | None:
        """The stream of a chain with an alteration in it; None for a plain chain."""
        alterations = [self._alteration_before(addition) for addition in chain]
        scaled = any(scales_operand(a.node, a.skip) for a in chain)
        if not scaled and not any(alteration.nodes for alteration in alterations):
            return None
        assert not any(self.reads.turns_above(a.skip) for a in chain[1:]), "only plain chains turn"
        first = chain[0]
        at_root = self.reads.value_read(first.skip, first.node) is first.previous
        states = [State(first.skip if at_root else first.previous, 0, (), None)]
        for addition, alteration in zip(chain, alterations, strict=True):
            states[-1:] = self._passed_on(states[-1], addition, alteration)
            depth = states[-1].depth + int(addition.is_residual)
            states.append(State(addition.node, depth, (), addition))
        states[-1:] = self._ended(states[-1], chain, alterations[1:])
        while len(states) > 1 and not states[-1].reads:
            states.pop()
        return ResidualStream(tuple(states), sublayers_of(states), deltas=True)

    def passed(self, stream: ResidualStream) -> set[fx.Node]:
        """The nodes between the additions of a stream."""
        return {node for a in stream.chain for node in self._alteration_before(a).nodes}

    def _scaled(self, candidates: Sequence[fx.Node]) -> dict[fx.Node, Addition]:
        """Rule 1."""
        options = {
            node: self._skips_above(node) for node in candidates if node not in self.accepted
        }
        found: dict[fx.Node, Addition] = {}

        def root(value: fx.Node) -> fx.Node:
            while value in found or value in self.accepted:
                value = (found.get(value) or self.accepted[value]).previous
            return value

        above = [addition.previous for each in options.values() for addition in each]
        if not above:
            return {}
        bit, _, projected = self.view.dependency_masks(
            dict.fromkeys([*above, *map(root, above)]), mixes=ops.is_projection
        )
        for node, additions in options.items():
            fitting = [
                addition
                for addition in additions
                if any(
                    projected[self.reads.value_read(part, node)] & bit[root(addition.previous)]
                    and not self._ends_in(part, node, {*found, *self.accepted})
                    for part in addition.branch
                )
                and self._alteration(addition) is not None
            ]
            if fitting:  # the operand that was made first, and its nearest value
                first = min(fitting, key=lambda a: self.view.order[a.previous]).skip_position
                found[node] = next(a for a in fitting if a.skip_position == first)
        return found

    def _ends_in(self, part: fx.Node, user: fx.Node, additions: set[fx.Node]) -> bool:
        """Whether an operand is an addition, scaled: then that goes on, not the other operand."""
        return any(value in additions for _, value in walk_up_alterations(part, user, self.reads))

    def _skips_above(self, node: fx.Node) -> list[Addition]:
        """Readings of ``g(x) + f(x)``: each operand as the skip, of the values above it."""
        operands = ops.operands(node)
        if len(operands) != 2 or shape_of(operands[0]) != shape_of(operands[1]):
            return []
        found = []
        for position, skip in enumerate(operands):
            above = [source for _, source in walk_up_alterations(skip, node, self.reads)]
            if scales_operand(node, skip):
                above.insert(0, self.reads.value_read(skip, node))
            found += [Addition(node, value, position, is_residual=True) for value in above]
        return found

    def _linked(
        self, addition: Addition, known: Mapping[fx.Node, Addition], continued: set[fx.Node]
    ) -> Addition:
        """Rule 2."""
        if addition.previous in known or not self.within(addition.node):
            return addition
        ends = self._ends_above(addition.previous, known)
        for end in sorted(ends, key=self.view.order.__getitem__, reverse=True):
            linked = replace(addition, previous=end)
            free = self.within(end) and end not in continued
            if free and self._alteration(linked) is not None:
                return linked
        return addition

    def _ends_above(self, value: fx.Node, known: Mapping[fx.Node, Addition]) -> set[fx.Node]:
        """The additions that are reached upwards over nodes that keep the form."""
        pending, ends = [value], set()
        for node in pending:
            if len(pending) > _LONGEST_ALTERATION or not keeps_form(node):
                continue
            for part in ops.value_arguments(node):
                above = self.reads.value_read(part, node) if is_tensor(part) else part
                if is_tensor(above) and num_elements(above) != num_elements(value):
                    continue
                if above in known:
                    ends.add(above)
                elif above not in pending:
                    pending.append(above)
        return ends

    def _alteration(self, addition: Addition) -> Alteration | None:
        end = self.reads.value_read(addition.skip, addition.node)
        return alteration_between(self.view, self.reads, addition.previous, end)

    def _alteration_before(self, addition: Addition) -> Alteration:
        found = self._alteration(addition)
        assert found is not None, f"the skip of {addition.node} was found to carry a state"
        return found

    def _passed_on(self, state: State, addition: Addition, alteration: Alteration) -> list[State]:
        """A state up to the next addition: it, and what is read on the way (rule 3)."""
        inner = {*alteration.nodes}
        states = []
        for value in (alteration.source, *alteration.cuts):
            found = self.reads.of(value)
            carries = tuple(r for r in found if r.user in inner or _is_skip(r, addition))
            read = tuple(r for r in found if r not in carries)
            if value is alteration.source:
                states.append(replace(state, reads=read, carries=carries))
            elif read:
                states.append(State(value, state.depth, read, None, carries))
        return states

    def _ended(
        self, last: State, chain: Sequence[Addition], alterations: Sequence[Alteration]
    ) -> list[State]:
        """The state after the last addition, and what comes of it by rule 4."""
        patterns = [
            self._up_to_first_read(addition, alteration)
            for addition, alteration in zip(chain, alterations, strict=False)
        ]
        distinct = dict.fromkeys(filter(None, reversed(patterns)))
        for pattern in sorted(distinct, key=len, reverse=True):
            nodes = self._followed(last.node, pattern, _shared_calls(chain))
            if nodes:
                carries = tuple(r for r in self.reads.of(last.node) if r.user in nodes)
                end = State(nodes[-1], last.depth, tuple(self.reads.of(nodes[-1])), None)
                return [replace(last, carries=carries), end]
        return [replace(last, reads=tuple(self.reads.of(last.node)))]

    def _up_to_first_read(self, addition: Addition, alteration: Alteration) -> tuple[str, ...]:
        """The operations between an addition and the first value after it that is read."""
        inner = {*alteration.nodes}
        for value in (addition.node, *alteration.cuts):
            if any(read.user not in inner for read in self.reads.of(value)):
                return tuple(ops.operation(node) for node in alteration.nodes if node <= value)
        return ()

    def _followed(
        self, last: fx.Node, pattern: Sequence[str], calls: tuple[ModuleCall, ...]
    ) -> tuple[fx.Node, ...]:
        """The nodes after the last addition, if they do what the pattern says; otherwise none."""
        nodes = [last]
        for name in pattern:
            after = self._users(nodes)
            if not after or ops.operation(after[0]) != name:
                return ()
            if module_calls(after[0])[: len(calls)] != calls:
                return ()
            nodes.append(after[0])
        alteration = alteration_between(self.view, self.reads, last, nodes[-1])
        whole = alteration is not None and alteration.nodes == tuple(nodes[1:])
        left = set(self._users(nodes[:-1])) - set(nodes)
        return tuple(nodes[1:]) if whole and not left else ()

    def _users(self, nodes: Sequence[fx.Node]) -> list[fx.Node]:
        """Who else takes any of these nodes, or sees what they wrote in place; in graph order."""
        users = {user for n in nodes for user in n.users if n in ops.value_arguments(user)}
        users |= {read.user for node in nodes for read in self.reads.of(node)}
        return sorted(users - {*nodes}, key=self.view.order.__getitem__)


def _with_plain_successor(additions: Sequence[Addition]) -> set[fx.Node]:
    """The values that a residual addition goes on with as they are, at once or later."""
    leading: set[fx.Node] = set()
    for addition in reversed(additions):
        if addition.is_residual or addition.node in leading:
            leading.add(addition.previous)
    return leading


def _is_skip(read: Read, addition: Addition) -> bool:
    return read.user is addition.node and read.operand is addition.skip


def _shared_calls(chain: Sequence[Addition]) -> tuple[ModuleCall, ...]:
    """The module calls that hold every residual addition, outermost first."""
    calls = [module_calls(addition.node) for addition in chain if addition.is_residual]
    shared = []
    for level in zip(*calls, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return tuple(shared)
