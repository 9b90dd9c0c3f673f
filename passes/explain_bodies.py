"""Say why residual additions in the bodies of loops and branches are not converted."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx
from torch._ops import HigherOrderOperator

from attnres_compile.passes.graph_values import module_path, source_line
from attnres_compile.passes.loops import is_loop, loop_of, trip_count, two_iterations
from attnres_compile.passes.streams import Refusal


def explain_bodies(graph: fx.Graph, count: Callable[[fx.Graph], int]) -> list[Refusal]:
    """A refusal for every residual addition in a body; `count` says how many a graph has."""
    refusals = []
    for node in graph.nodes:
        if not isinstance(node.target, HigherOrderOperator):
            continue
        found = _per_iteration(node, count)
        reason = (
            f"the residual addition stands in the body of {node.target}, which {_why_closed(node)}"
        )
        refusal = Refusal("inner-graph", reason, module_path(node), source_line(node))
        refusals += [refusal] * found
    return refusals


def _per_iteration(node: fx.Node, count: Callable[[fx.Graph], int]) -> int:
    """How many residual additions the bodies of a call have; some show from one to the next."""
    owner = node.graph.owning_module
    if not is_loop(node) or owner is None:
        return sum(count(body.graph) for body in _bodies(node))
    loop = loop_of(owner, node)
    if trip_count(loop) == 0:
        return 0
    return (count(two_iterations(loop).module.graph) + 1) // 2


def _why_closed(node: fx.Node) -> str:
    """Why a body was not opened before the analysis."""
    owner = node.graph.owning_module
    if not is_loop(node) or owner is None:
        return "is not entered; write the branch or loop in Python"
    trips = trip_count(loop_of(owner, node))
    if isinstance(trips, str):
        return (
            f"{trips}, where every sublayer needs a query of its own; loop a fixed number of times"
        )
    return "carries no stream from one iteration to the next; apply these layers outside of it"


def _bodies(node: fx.Node) -> list[fx.GraphModule]:
    owner = node.graph.owning_module
    attributes = [a for a in node.all_input_nodes if a.op == "get_attr"]
    found = [getattr(owner, str(attribute.target), None) for attribute in attributes]
    return [body for body in found if isinstance(body, fx.GraphModule)]
