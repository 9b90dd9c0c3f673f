"""Put what C++ does for a site into the graph that Inductor lowers: room, and calls that fill it.

A site that is computed in C++ is one operator until here, so that autograd and Inductor's passes
see what it is. At the end it becomes the operators that its function in ``cpp_phases.py`` calls.
Inductor then plans the memory of its results with all the rest: they go where a buffer has just
become free and not to new pages, and a call costs half as much.

Contract: values are the same bit for bit, but for the additions that ``absorb_biases.py`` and
``absorb_gradients.py`` move, and sums over tokens (``sum_tokens.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.pattern_matcher import stable_topological_sort
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from attnres_compile.kernels import cpp_library, cpp_phases, phases
from attnres_compile.kernels.stand_ins import stand_in
from attnres_compile.passes.absorb_biases import absorb_biases
from attnres_compile.passes.absorb_gradients import absorb_gradients
from attnres_compile.passes.call_directly import call_directly
from attnres_compile.passes.cpp_calls import dtypes_of
from attnres_compile.passes.realize_rows import realize_rows
from attnres_compile.passes.sum_tokens import sum_tokens
from attnres_compile.passes.trim_calls import trim_calls
from attnres_compile.passes.write_in_place import write_in_place


class InlineCppPhases(CustomGraphPass):
    """The pass, as Inductor runs it after its own ones."""

    def __call__(self, graph: fx.Graph) -> None:
        bodies = _bodies()
        nodes = [n for n in graph.nodes if n.target in bodies and n.args[-1] == "cpp"]
        if not nodes:
            return
        realize_rows()
        call_directly()
        # A reader of room does not depend on the call that writes to it: their order has to be
        # right before, and Inductor's later sorting keeps it.
        stable_topological_sort(graph)
        for node in nodes:
            if node.users:
                _inline(graph, node, bodies[node.target])
            else:
                graph.erase_node(node)
        absorb_gradients(graph)
        absorb_biases(graph)
        sum_tokens(graph, dtypes_of(graph))
        # There views are calls as well, whose readers Inductor may move past what writes over them.
        if not torch._inductor.config.fallback_by_default:
            write_in_place(graph)
        trim_calls(graph)
        graph.eliminate_dead_code()

    def uuid(self) -> Any:
        folders = Path(__file__).parent, Path(cpp_library.__file__).parent
        return get_hash_for_files(tuple(sorted(str(f) for d in folders for f in d.glob("*.py"))))


def _bodies() -> dict[Any, Callable[..., Any]]:
    """What computes each phase in C++, by its operator."""
    assert phases.complete is not None  # has registered the operators
    names = [name for name in cpp_library.NAMES if name != "sum_tokens"]
    bodies = {name: getattr(cpp_phases, name) for name in names} | {"phase1": _phase1}
    return {getattr(torch.ops.attnres, name).default: body for name, body in bodies.items()}


def _phase1(
    sources: Sequence[Tensor], carriers: Sequence[Tensor], logits: Sequence[Tensor], dim: int
) -> tuple[list[Tensor], Tensor, list[Tensor], Tensor]:
    mixes, statistics, weights = cpp_phases.phase1(sources, logits, dim)
    return mixes, statistics, [stand_in(source) for source in sources], weights


def _inline(graph: fx.Graph, node: fx.Node, body: Callable[..., Any]) -> None:
    given, structure = pytree.tree_flatten(node.args[:-1])
    inputs = [value for value in given if isinstance(value, fx.Node)]
    values = [each.meta["val"] for each in inputs]

    def run(*tensors: Any) -> Any:
        rest = iter(tensors)
        arguments = [next(rest) if isinstance(value, fx.Node) else value for value in given]
        return body(*pytree.tree_unflatten(arguments, structure))

    # For every site anew: memory that nodes share in their example values, they share in Inductor.
    with enable_python_dispatcher(), values[0].fake_mode:
        traced = make_fx(run, decomposition_table=select_decomp_table())(*values).graph
    placeholders = [n for n in traced.nodes if n.op == "placeholder"]
    copies = dict(zip(placeholders, inputs, strict=True))
    with graph.inserting_before(node):
        for each in traced.nodes:
            if each.op == "call_function":
                copies[each] = graph.node_copy(each, copies.__getitem__)
    (output,) = traced.output_node().args
    _replace(node, pytree.tree_map_only(fx.Node, copies.__getitem__, output))


def _replace(node: fx.Node, values: Any) -> None:
    """What a node returns, by `values` in the same structure; takes the node out."""
    if isinstance(values, fx.Node):
        node.replace_all_uses_with(values)
    else:
        for item in list(node.users):
            _replace(item, values[item.args[1]])
    node.graph.erase_node(node)
