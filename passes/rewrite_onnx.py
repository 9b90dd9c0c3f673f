"""Rewrite residual streams of an ONNX graph into calls of the functions ``attnres::Mix<n>``.

The same rewrite as `rewrite_residuals`, in another IR: the additions between become partial sums
of branches, and what stood for a state is now the mix of its sources. A mix takes the name of its
state, so that readers, bodies of If and Loop, outputs and value infos need no change.

Contract: needs streams found in the view of this very graph; changes nothing but the additions, and
casts and reshapes that only carried the stream from one to the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx
import torch
from onnx import helper

from attnres_compile.passes import operations as ops
from attnres_compile.passes.dataflow import Dataflow
from attnres_compile.passes.graph_values import dtype_of, shape_of
from attnres_compile.passes.layouts import inverse, order_of, turned
from attnres_compile.passes.onnx_graphs import all_nodes, read_values
from attnres_compile.passes.onnx_mix import mix_attributes, mix_node
from attnres_compile.passes.onnx_view import DTYPES, OnnxView
from attnres_compile.passes.rewrite_residuals import MixLayout
from attnres_compile.passes.streams import Addition, ResidualStream, State

ELEMENTS = {dtype: element for element, dtype in DTYPES.items()}

SiteNames = Mapping[int, tuple[str, str | None]]
"""Initialisers with query and gain of each site, by its position among the stream's states."""


@dataclass
class OnnxRewrite:
    """Changes to a graph, collected over its streams and then made at once.

    Attributes:
        replaced: the nodes to put in the place of the node that made a value.
        renamed: values that exist no more, and what stands for them.
        carriers: values that carried a state to the next addition; superfluous if nobody else asks.
        arities: how many sources the mixes have.
    """

    replaced: dict[str, list[onnx.NodeProto]] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    carriers: set[str] = field(default_factory=set)
    arities: set[int] = field(default_factory=set)


def rewrite_onnx(
    graph: onnx.GraphProto,
    view: OnnxView,
    streams: Mapping[str, tuple[ResidualStream, MixLayout, SiteNames]],
) -> set[int]:
    """Rewrites the streams of a graph, in place.

    Args:
        graph: the graph that `view` is a view of.
        view: in which the streams were found.
        streams: by the name to use for new values; with layout and parameters.

    Returns:
        The numbers of sources for which functions ``Mix<n>`` are needed.
    """
    taken = {o for node in all_nodes(graph) for o in node.output} | read_values(graph)
    rewrite = OnnxRewrite()
    for name, (stream, layout, parameters) in streams.items():
        writer = _StreamWriter(view, stream, layout, parameters, rewrite, _Namer(name, taken))
        for position, state in enumerate(stream.states[1:], start=1):
            writer.advance(position, state)
    _apply(graph, rewrite)
    return rewrite.arities


class _Namer:
    """New names of values, apart from all that the graph has."""

    def __init__(self, prefix: str, taken: set[str]) -> None:
        self._prefix = prefix
        self._taken = taken

    def __call__(self, name: str) -> str:
        wanted = f"attnres/{self._prefix}/{name}"
        count = 1
        while wanted in self._taken:
            count += 1
            wanted = f"attnres/{self._prefix}/{name}_{count}"
        self._taken.add(wanted)
        return wanted


@dataclass(frozen=True)
class _Value:
    """A value of the new graph: its name and ONNX element type."""

    name: str
    element: int


class _StreamWriter:
    """The sources of a stream, while its states are rewritten one after the other."""

    def __init__(
        self,
        view: OnnxView,
        stream: ResidualStream,
        layout: MixLayout,
        parameters: SiteNames,
        rewrite: OnnxRewrite,
        name: _Namer,
    ) -> None:
        self._view = view
        self._layout = layout
        self._parameters = parameters
        self._rewrite = rewrite
        self._name = name
        first = stream.states[1].addition
        assert first is not None
        self._root_node = first.skip
        self._root = _Value(view.names[first.skip], ELEMENTS[dtype_of(first.skip)])
        self._completed: list[_Value] = []
        self._partial: _Value | None = None
        lengths = layout.block_sublayers
        self._seals = {sum(lengths[: i + 1]) for i in range(len(lengths))}
        self._sublayers = 0
        self._open_additions = 0
        self._nodes: list[onnx.NodeProto] = []

    def advance(self, position: int, state: State) -> None:
        """Adds the branch of a state's addition and, where the state is read, puts its mix."""
        addition = state.addition
        assert addition is not None
        self._nodes = []
        name = self._view.names[state.node]
        branch = self._branch(state, addition)
        self._partial = branch if self._partial is None else self._add(self._partial, branch)
        self._open_additions += int(addition.is_residual)
        self._rewrite.carriers.update(
            self._view.names[node] for node in Dataflow.path_to_origin(addition.skip)
        )
        if state.reads:
            self._complete_sublayer()
            self._mix(position, state, name)
        else:  # who asks for its shape only may ask the skip as well
            self._rewrite.renamed[name] = self._view.names[addition.skip]
        self._rewrite.replaced[name] = self._nodes

    def _complete_sublayer(self) -> None:
        if self._open_additions == 0:
            return
        self._open_additions = 0
        self._sublayers += 1
        if self._sublayers in self._seals:
            assert self._partial is not None
            self._completed.append(self._partial)
            self._partial = None

    def _branch(self, state: State, addition: Addition) -> _Value:
        """What the addition adds, in the root's layout."""
        (node,) = addition.branch
        branch = _Value(self._view.names[node], ELEMENTS[dtype_of(node)])
        if ops.operation(addition.node) == "sub":
            branch = self._emit("Neg", branch)
        if shape_of(node) != shape_of(addition.node):
            branch = self._like("Expand", branch, self._view.names[addition.skip])
        for turn in reversed(state.turns):
            branch = self._like("Reshape", branch, self._view.names[turn])
            branch = self._turn(branch, inverse(order_of(turn)))
        if state.turns or shape_of(addition.node) != shape_of(self._root_node):
            branch = self._like("Reshape", branch, self._root.name)
        return branch

    def _mix(self, position: int, state: State, name: str) -> None:
        sources = [self._root, *self._completed]
        if self._partial is not None:
            sources.append(self._partial)
        element = ELEMENTS[dtype_of(state.node)]
        query, gain = self._parameters[position]
        moved = bool(state.turns) or shape_of(self._root_node) != shape_of(state.node)
        node = mix_node(
            [self._cast(source, element).name for source in sources],
            query,
            gain,
            self._name("mix") if moved else name,
            mix_attributes(
                len(sources),
                channel_dim=self._layout.channel_dim,
                rank=len(shape_of(self._root_node)),
                double=dtype_of(state.node) == torch.float64,
                eps=self._layout.eps,
                sums=self._layout.sums,
            ),
        )
        node.name = query.removesuffix(".query")
        self._nodes.append(node)
        self._rewrite.arities.add(len(sources))
        if moved:
            assert state.addition is not None
            mixed = _Value(node.output[0], element)
            for turn in state.turns:
                mixed = self._like("Reshape", mixed, self._view.names[turned(turn)])
                mixed = self._turn(mixed, order_of(turn))
            self._like("Reshape", mixed, self._view.names[state.addition.skip], name)

    def _add(self, left: _Value, right: _Value) -> _Value:
        return self._emit("Add", self._cast(left, right.element), right)

    def _cast(self, value: _Value, element: int) -> _Value:
        if value.element == element:
            return value
        output = self._name("cast")
        self._nodes.append(helper.make_node("Cast", [value.name], [output], to=element))
        return _Value(output, element)

    def _like(self, kind: str, value: _Value, other: str, output: str | None = None) -> _Value:
        """Expand or Reshape to the shape of another value."""
        shape = self._name("shape")
        self._nodes.append(helper.make_node("Shape", [other], [shape]))
        made = output or self._name(kind.lower())
        self._nodes.append(helper.make_node(kind, [value.name, shape], [made]))
        return _Value(made, value.element)

    def _turn(self, value: _Value, order: tuple[int, ...]) -> _Value:
        output = self._name("transpose")
        self._nodes.append(helper.make_node("Transpose", [value.name], [output], perm=order))
        return _Value(output, value.element)

    def _emit(self, kind: str, *values: _Value) -> _Value:
        output = self._name({"Add": "partial", "Neg": "branch"}[kind])
        self._nodes.append(helper.make_node(kind, [value.name for value in values], [output]))
        return _Value(output, values[0].element)


def _apply(graph: onnx.GraphProto, rewrite: OnnxRewrite) -> None:
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        new = rewrite.replaced.get(node.output[0]) if node.output else None
        for made in new or ():
            made.metadata_props.extend(node.metadata_props)
        nodes += [node] if new is None else new
    for node in nodes:
        for position, name in enumerate(node.input):
            node.input[position] = _current(name, rewrite.renamed)
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_carriers(graph, rewrite.carriers)
    names = {output for node in graph.node for output in node.output}
    infos = [info for info in graph.value_info if info.name in names]
    del graph.value_info[:]
    graph.value_info.extend(infos)


def _current(name: str, renamed: Mapping[str, str]) -> str:
    while name in renamed:
        name = renamed[name]
    return name


def _drop_carriers(graph: onnx.GraphProto, carriers: set[str]) -> None:
    """Removes casts, reshapes and copies that only led to an addition which is no more."""
    while True:
        read = read_values(graph)
        dead = [
            node
            for node in graph.node
            if set(node.output) <= carriers and not read & set(node.output)
        ]
        if not dead:
            return
        for node in dead:
            graph.node.remove(node)
