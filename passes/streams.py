"""What the analysis finds: residual streams, as they stand in one graph, and refusals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from attnres_compile.passes import operations as ops
from attnres_compile.passes.dataflow import Read


@dataclass(frozen=True)
class Addition:
    """One addition ``node = skip + branch`` of a chain.

    Attributes:
        node: the addition; its value is the next state of the stream.
        previous: the node that made the state (or root) which the skip operand carries, in a
            stream of `deltas` altered or not.
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
class State:
    """A state of a stream: the root, or the value after an addition.

    Attributes:
        node: what made it; for the root, the skip operand of the first addition.
        depth: how many residual additions precede it.
        reads: its uses other than the skip of the next state; a state with reads is a site.
        addition: the addition that made it; None for the root, and in a stream of `deltas` for
            what an alteration made of the state before.
        carries: in a stream of `deltas`, the uses that lead to the next state.
        turns: the transpositions that make its layout of the root's, in order (see `layouts`).
    """

    node: fx.Node
    depth: int
    reads: tuple[Read, ...]
    addition: Addition | None
    carries: tuple[Read, ...] = ()
    turns: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class ResidualStream:
    """A chain of residual additions, as it stands in one graph.

    Attributes:
        states: root first; the last one is read.
        sublayers: for each sublayer, the residual additions it sums.
        deltas: the carrier is altered between additions (a norm, an activation, a scale), so that
            its sources are differences of states; see `find_delta_streams`.
    """

    states: tuple[State, ...]
    sublayers: tuple[tuple[Addition, ...], ...]
    deltas: bool = False

    @property
    def additions(self) -> tuple[Addition, ...]:
        """The residual additions, without the absorbed ones."""
        return tuple(addition for sublayer in self.sublayers for addition in sublayer)

    @property
    def chain(self) -> tuple[Addition, ...]:
        """All additions, the absorbed ones too."""
        return tuple(state.addition for state in self.states if state.addition is not None)

    @property
    def sites(self) -> tuple[State, ...]:
        return tuple(state for state in self.states if state.reads)


def sublayers_of(states: Sequence[State]) -> tuple[tuple[Addition, ...], ...]:
    """The residual additions between reads: maximal runs, root first."""
    sublayers: list[list[Addition]] = [[]]
    for state in states:
        if state.addition is not None and state.addition.is_residual:
            sublayers[-1].append(state.addition)
        if state.reads and sublayers[-1]:
            sublayers.append([])
    return tuple(tuple(sublayer) for sublayer in sublayers if sublayer)


@dataclass(frozen=True)
class Refusal:
    """A residual-looking addition that is not converted.

    Attributes:
        kind: a word for the reason: post-norm, post-activation, single-sublayer, ...
        reason: one sentence for a person.
        module_path: the module the addition was traced in.
        source: its source line, ``file.py:123``.
        node: its name in the graph; empty where the refusal is of more than one addition.
    """

    kind: str
    reason: str
    module_path: str
    source: str
    node: str = field(default="", compare=False, repr=False)


@dataclass(frozen=True)
class StreamAnalysis:
    """What one graph holds: the streams that can be converted, and what was refused."""

    streams: tuple[ResidualStream, ...]
    refusals: tuple[Refusal, ...]
