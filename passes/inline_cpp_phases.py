"""Put what the C++ phases do into the graph that Inductor lowers: room, and calls that write to it.

A phase that computes in C++ is one operator until here, so that autograd and the passes of Inductor
see what it is. At the end it becomes the operators that its function in ``cpp_phases.py`` calls.
Inductor then plans the memory of its results with all the rest: they go where a buffer has just
become free and not to new pages, and a call costs half as much.

Contract: values are the same bit for bit, but for the biases that ``absorb_biases.py`` moves.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from attnres_compile.kernels import cpp_library, cpp_phases, phases
from attnres_compile.kernels.plain_phases import stand_in
from attnres_compile.passes.absorb_biases import absorb_biases

NAMES = (
    "complete",
    "complete_backward",
    "phase1",
    "phase1_backward",
    "phase2",
    "phase2_backward",
)


class InlineCppPhases(CustomGraphPass):
    """The pass, as Inductor runs it after its own ones."""

    def __call__(self, graph: fx.Graph) -> None:
        bodies = _bodies()
        for node in list(graph.nodes):
            if node.target in bodies and node.args[-1] == "cpp":
                _inline(graph, node, bodies[node.target])
        absorb_biases(graph)
        graph.eliminate_dead_code()

    def uuid(self) -> Any:
        parts = (InlineCppPhases, absorb_biases, cpp_phases, cpp_library)
        return get_hash_for_files(tuple(inspect.getfile(part) for part in parts))


def _bodies() -> dict[Any, Callable[..., Any]]:
    """What computes each phase in C++, by its operator."""
    assert phases.complete is not None  # has registered the operators
    bodies = {name: getattr(cpp_phases, name) for name in NAMES} | {"phase1": _phase1}
    return {getattr(torch.ops.attnres, name).default: body for name, body in bodies.items()}


def _phase1(
    sources: Sequence[Tensor], carriers: Sequence[Tensor], logits: Sequence[Tensor], dim: int
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    mixes, statistics = cpp_phases.phase1(sources, logits, dim)
    return mixes, statistics, [stand_in(source) for source in sources]


def _inline(graph: fx.Graph, node: fx.Node, body: Callable[..., Any]) -> None:
    given, structure = pytree.tree_flatten(node.args[:-1])
    inputs = [value for value in given if isinstance(value, fx.Node)]

    def run(*tensors: Any) -> Any:
        rest = iter(tensors)
        values = [next(rest) if isinstance(value, fx.Node) else value for value in given]
        return body(*pytree.tree_unflatten(values, structure))

    with enable_python_dispatcher():
        traced = make_fx(run)(*(each.meta["val"] for each in inputs))
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    copies = dict(zip(placeholders, inputs, strict=True))
    with graph.inserting_before(node):
        for each in traced.graph.nodes:
            if each.op == "call_function":
                copies[each] = graph.node_copy(each, copies.__getitem__)
    (output,) = traced.graph.output_node().args
    _replace(node, pytree.tree_map_only(fx.Node, copies.__getitem__, output))


def _replace(node: fx.Node, values: Any) -> None:
    """What a node returns, by `values` in the same structure; takes the node out."""
    if isinstance(values, fx.Node):
        node.replace_all_uses_with(values)
    else:
        for item in list(node.users):
            _replace(item, values[item.args[1]])
    node.graph.erase_node(node)
