"""Say of every addition of a graph what it is, or which rule says that it is no residual addition.

The rules are those of `find_streams`, which decides; this only tells. What is told of an addition
that stands in no stream and in no refusal is the last rule that it still fulfils.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from attnres_compile.passes import operations as ops
from attnres_compile.passes.dataflow import Dataflow, Reads
from attnres_compile.passes.graph_values import dtype_of, module_path, shape_of, source_line
from attnres_compile.passes.streams import Refusal, ResidualStream


@dataclass(frozen=True)
class Explanation:
    """What one addition is.

    Attributes:
        module_path: the module it was traced in.
        source: its source line, ``file.py:123``.
        verdict: ``residual``, ``absorbed``, ``refused``, or ``none`` for no residual addition.
        rule: a word for the rule that decided.
        reason: one sentence for a person.
    """

    module_path: str
    source: str
    verdict: str
    rule: str
    reason: str


def explain_additions(
    view: Dataflow, streams: Sequence[ResidualStream], refusals: Iterable[Refusal]
) -> dict[fx.Node, Explanation]:
    """Every addition of two tensors in a graph, in graph order.

    Args:
        view: of the graph.
        streams: those that were found in it.
        refusals: the residual-looking additions that are in none of them.
    """
    told = {node: found for stream in streams for node, found in _of_stream(stream).items()}
    by_name, by_place = {}, {}
    for each in refusals:
        if each.node:
            by_name[each.node] = each
        else:
            by_place[each.module_path, each.source] = each
    others = []
    for node in filter(_adds_tensors, view.order):
        if node in told:
            continue
        place = (module_path(node), source_line(node))
        refusal = by_name.get(node.name) or by_place.get(place)
        if refusal is not None:
            told[node] = _told(node, "refused", refusal.kind, refusal.reason)
        else:
            others.append(node)
    told.update(_explain_others(view, streams, others))
    return {node: told[node] for node in sorted(told, key=view.order.__getitem__)}


def _of_stream(stream: ResidualStream) -> dict[fx.Node, Explanation]:
    found = {}
    for state in stream.states[1:]:
        if state.addition is None:  # a norm or the like, in a stream of deltas
            continue
        if state.addition.is_residual:
            reason = f"residual addition {state.depth} of {len(stream.additions)} of its stream"
            found[state.node] = _told(state.node, "residual", "residual", reason)
        else:
            reason = (
                "absorbed into the partial sum: it adds to a state of the stream something that "
                "does not depend on the stream"
            )
            found[state.node] = _told(state.node, "absorbed", "absorbed", reason)
    return found


def _explain_others(
    view: Dataflow, streams: Sequence[ResidualStream], nodes: list[fx.Node]
) -> dict[fx.Node, Explanation]:
    """Additions that are neither in a stream nor refused."""
    reads = Reads(view)
    root_of = {}
    for stream in streams:
        start = stream.chain[0].previous
        root_of.update({state.node: start for state in stream.states[1:]})

    def root(value: fx.Node) -> fx.Node:
        return root_of.get(value, value)

    pairs = {node: [reads.value_read(o, node) for o in ops.operands(node)] for node in nodes}
    roots = {root(value): None for values in pairs.values() for value in values}
    bit, any_path, mixing_path = view.dependency_masks(roots)
    told = {}
    for node in nodes:
        rule, reason = _simple_reason(node) or ("", "")
        if not rule:
            depends = mixes = False
            for skip in pairs[node]:
                rest = [value for value in pairs[node] if value is not skip]
                depends = depends or any(any_path[value] & bit[root(skip)] for value in rest)
                mixes = mixes or any(mixing_path[value] & bit[root(skip)] for value in rest)
            first, *others = pairs[node]
            added = any(mixing_path[value] & bit[root(first)] for value in others)
            if mixes and not added and ops.operation(node) == "sub":
                rule, reason = _SUBTRACTION
            else:
                rule, reason = _reason_of_dependence(node, depends=depends, mixes=mixes)
        told[node] = _told(node, "none", rule, reason)
    return told


_SUBTRACTION = (
    "subtraction",
    "it subtracts what the other operand is computed from, f(x) - x, and adds nothing to that",
)


def _simple_reason(node: fx.Node) -> tuple[str, str] | None:
    """Rules that need no look at the rest of the graph."""
    shapes = [shape_of(operand) for operand in ops.operands(node)]
    if not dtype_of(node).is_floating_point:
        return "dtype", f"it adds {str(dtype_of(node)).removeprefix('torch.')}, no floating point"
    if len(shape_of(node)) < 2:
        return (
            "rank",
            f"its result has the shape {list(shape_of(node))}; a stream has a channel "
            "and at least one more dimension",
        )
    if shape_of(node) not in shapes:
        return (
            "shapes",
            f"shapes differ: no operand has the shape {list(shape_of(node))} of the "
            f"result, they are {' and '.join(str(list(shape)) for shape in shapes)}",
        )
    return None


def _reason_of_dependence(node: fx.Node, *, depends: bool, mixes: bool) -> tuple[str, str]:
    shapes = {shape_of(operand) for operand in ops.operands(node)}
    if not depends:
        return "independent", (
            "the branch does not depend on the stream: neither operand is computed from the other "
            "(as two embeddings, a mask, a bias or the halves of a rotary embedding are not)"
        )
    if not mixes:
        return "element-wise", (
            "only element-wise operations lie between the skip and the branch (as in a gate, an "
            "activation or a rotary embedding)"
        )
    if len(shapes) > 1:
        return "shapes", (
            f"shapes differ: a branch of {' and '.join(str(list(s)) for s in sorted(shapes))} "
            "would be broadcast"
        )
    return "unread", "nothing reads its result as a state of a stream"


def _adds_tensors(node: fx.Node) -> bool:
    return ops.is_addition(node) and len(ops.operands(node)) > 1


def _told(node: fx.Node, verdict: str, rule: str, reason: str) -> Explanation:
    return Explanation(module_path(node), source_line(node), verdict, rule, reason)
