"""Rewrite residual streams into Block Attention Residual mixes.

Every state that is read becomes a mix over the sources of its site; the additions between become
partial sums of branches. With sublayer outputs ``v`` grouped into blocks, the sources of a site are
the root, the sums of the completed blocks, and the partial sum of the block in progress, if any
(arXiv 2603.15031, equations 5 and 6). They always sum to the ordinary residual stream.

Contract: needs streams found in this very graph and a layout for each; changes nothing but the
additions, their readers' operands, and copies or views that nothing uses any more.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from attnres_compile.errors import MismatchError
from attnres_compile.kernels import ops as kernel_ops  # noqa: F401  registers attnres::mix
from attnres_compile.passes import operations as ops
from attnres_compile.passes.concatenations import concatenated_part
from attnres_compile.passes.graph_editor import Editor
from attnres_compile.passes.graph_values import dtype_of, shape_of, source_line
from attnres_compile.passes.layouts import inverse, order_of, turned
from attnres_compile.passes.streams import Addition, ResidualStream, State

aten = torch.ops.aten


@dataclass(frozen=True)
class MixLayout:
    """How the mixes of one stream are computed.

    Attributes:
        block_sublayers: how many sublayers each block has.
        sums: multiply each mix by its number of sources (``aggregate="sum"``).
        eps: of the keys' RMSNorm.
        channel_dim: -1 or 1.
    """

    block_sublayers: tuple[int, ...]
    sums: bool
    eps: float
    channel_dim: int


SiteParameters = Mapping[int, tuple[fx.Node, fx.Node | None]]
"""Query and key gain of each site, by its position among the stream's states.

A site that is missing was left out by the user: its readers get the plain residual sum.
"""


def rewrite_residuals(
    graph: fx.Graph, stream: ResidualStream, layout: MixLayout, parameters: SiteParameters
) -> None:
    """Rewrites one stream of a graph, in place.

    Args:
        graph: the graph that `stream` was found in, with its reads redirected (`redirect_reads`).
        stream: the states and additions to rewrite; none of `deltas` (see `rewrite_deltas`).
        layout: blocks and the form of the mix.
        parameters: graph nodes holding query [D] and gain [D] of every site with several sources.

    Raises:
        MismatchError: a mix has no reader, so the state it stands for was read in another way.
    """
    writer = _StreamWriter(graph, stream, layout, parameters)
    mixes = [writer.advance(n, state) for n, state in enumerate(stream.states[1:], start=1)]
    _erase_dead(graph, [state.node for state in stream.states[1:]])
    for state, mixed in zip(stream.states[1:], mixes, strict=True):
        if mixed is not None and not mixed.users.keys() - writer.plain_sums:
            raise unread(state)


class _StreamWriter:
    """The sources of a stream, while its states are rewritten one after the other.

    Attributes:
        plain_sums: nodes of the plain residual sum, for the sites that were left out.
    """

    def __init__(
        self,
        graph: fx.Graph,
        stream: ResidualStream,
        layout: MixLayout,
        parameters: SiteParameters,
    ) -> None:
        self._graph = graph
        self._layout = layout
        self._parameters = parameters
        first = stream.states[1].addition
        assert first is not None
        # As it stands now: a stream around this one may have been rewritten before.
        self._root = first.skip
        self._completed: list[fx.Node] = []
        self._partial: fx.Node | None = None
        self._plain = self._root
        self._not_in_plain: list[fx.Node] = []
        self.plain_sums: set[fx.Node] = set()
        self._seals = ends_of(layout.block_sublayers)
        self._sublayers = 0
        self._open_additions = 0

    def advance(self, position: int, state: State) -> fx.Node | None:
        """Adds the branch of a state's addition and, where the state is read, puts its mix."""
        assert state.addition is not None
        with self._graph.inserting_before(state.node):
            edit = Editor(self._graph, state.node)
            branch = self._branch(edit, state, state.addition)
            self._partial = branch if self._partial is None else edit.add(self._partial, branch)
            self._not_in_plain.append(branch)
            self._open_additions += int(state.addition.is_residual)
            if not state.reads:
                # Who asks for its shape or dtype only may ask the skip as well.
                skip = edit.cast(state.addition.skip, dtype_of(state.node))
                state.node.replace_all_uses_with(skip)
                return None
            self._complete_sublayer()
            chosen = position in self._parameters
            mixed = self._mix(edit, position, state) if chosen else self._sum(edit, state)
            state.node.replace_all_uses_with(mixed)
            return mixed

    def _complete_sublayer(self) -> None:
        if self._open_additions == 0:
            return
        self._open_additions = 0
        self._sublayers += 1
        if self._sublayers in self._seals:
            assert self._partial is not None
            self._completed.append(self._partial)
            self._partial = None

    def _branch(self, edit: Editor, state: State, addition: Addition) -> fx.Node:
        """What the addition adds, in the root's layout and the state's dtype."""
        branch = _branch_operand(edit, addition)
        if shape_of(branch) != shape_of(addition.node):
            branch = edit.call(aten.expand_as.default, branch, addition.skip)
        branch = edit.cast(branch, dtype_of(addition.node))
        for turn in reversed(state.turns):
            branch = _like(edit, branch, turn)
            branch = edit.call(aten.permute.default, branch, inverse(order_of(turn)))
        return _like(edit, branch, self._root)

    def _mix(self, edit: Editor, position: int, state: State) -> fx.Node:
        sources = [self._root, *self._completed]
        if self._partial is not None:
            sources.append(self._partial)
        mixed = write_mix(
            edit, sources, dtype_of(state.node), self._parameters[position], self._layout
        )
        return _in_layout_of(edit, mixed, state)

    def _sum(self, edit: Editor, state: State) -> fx.Node:
        """The plain residual sum, branch by branch: rounded as the unconverted model rounds it."""
        for branch in self._not_in_plain:
            self._plain = edit.add(self._plain, branch)
            self.plain_sums.add(self._plain)
        self._not_in_plain = []
        return _in_layout_of(edit, self._plain, state)


def _in_layout_of(edit: Editor, value: fx.Node, state: State) -> fx.Node:
    """A value in the root's layout, in the one that the readers of a state expect."""
    assert state.addition is not None
    for turn in state.turns:
        value = _like(edit, value, turned(turn))
        value = edit.call(aten.permute.default, value, order_of(turn))
    return _like(edit, value, state.addition.skip)


def _like(edit: Editor, value: fx.Node, other: fx.Node) -> fx.Node:
    same = shape_of(value) == shape_of(other)
    return value if same else edit.call(aten.reshape_as.default, value, other)


def write_mix(
    edit: Editor,
    sources: Sequence[fx.Node],
    dtype: torch.dtype,
    parameters: tuple[fx.Node, fx.Node | None],
    layout: MixLayout,
) -> fx.Node:
    """The mix of a site over its sources, in the dtype of its state and the root's shape."""
    query, gain = parameters
    outputs = edit.call(
        torch.ops.attnres.mix.default,
        [edit.cast(source, dtype) for source in sources],
        query,
        gain,
        layout.eps,
        layout.sums,
        layout.channel_dim,
    )
    return edit.call(operator.getitem, outputs, 0)


def _branch_operand(edit: Editor, addition: Addition) -> fx.Node:
    """The branch of ``skip + alpha * branch``, ``skip - branch`` or ``addcmul(skip, a, b)``."""
    node = addition.node
    if ops.operation(node) == "addcmul":
        product = edit.call(aten.mul.Tensor, *addition.branch)
        return _scaled(edit, product, ops.argument(node, 3, "value", 1))
    (branch,) = addition.branch
    factor = ops.argument(node, 2, "alpha", 1)
    return _scaled(edit, branch, -factor if ops.operation(node) == "sub" else factor)


def _scaled(edit: Editor, branch: fx.Node, factor: float) -> fx.Node:
    return branch if factor == 1 else edit.call(aten.mul.Tensor, branch, factor)


def unread(state: State) -> MismatchError:
    """A state whose mix nobody reads."""
    line = source_line(state.node) or "an unknown line"
    return MismatchError(
        f"the residual addition at {line} is read in a way that the rewrite could not follow; make "
        "it out of place. Please report this."
    )


def ends_of(lengths: Sequence[int]) -> set[int]:
    """After how many sublayers each block is complete."""
    ends, total = set(), 0
    for length in lengths:
        total += length
        ends.add(total)
    return ends


def _erase_dead(graph: fx.Graph, additions: list[fx.Node]) -> None:
    """Erases rewritten additions and the copies and views that only served them.

    Nothing else: dead code elimination is unsafe on torch-level graphs, where in-place methods do
    not count as impure.
    """
    for addition in reversed(additions):
        pending = [addition]
        while pending:
            node = pending.pop()
            if node.users or not (node is addition or _only_carries(node)):
                continue
            pending += node.all_input_nodes
            graph.erase_node(node)


def _only_carries(node: fx.Node) -> bool:
    """A copy or view, or a part taken from a concatenation: it computes nothing."""
    if node.op not in ("call_function", "call_method"):
        return False
    if ops.is_value_preserving(node) or ops.is_reshape(node) or ops.permutation(node) is not None:
        return True
    return concatenated_part(node) is not None
