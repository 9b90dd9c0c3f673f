"""What may happen to a carrier between residual additions that changes its values, not its form.

A norm, an activation, a scale, dropout, a cast: one state goes in, and one of the same elements
comes out. Block sums do not survive that, differences of states do (`find_delta_streams`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from attnres_compile.passes import operations as ops
from attnres_compile.passes.dataflow import Dataflow, Reads
from attnres_compile.passes.graph_values import is_tensor, shape_of

LONGEST_INTERRUPTION = 16  # nodes; the longest decomposed norm seen has 11
_MOST_NODES_BETWEEN = 200  # looked at between two values, side computations counted
_MOST_NODES_OF_A_SCALE = 16  # between a learned gate and the parameters that it is made of
Order = tuple[int, ...]


@dataclass(frozen=True)
class Alteration:
    """What happens to a carrier on its way from one value to a later one.

    Attributes:
        source: the node that made the value it starts from.
        nodes: all nodes on the way, in graph order, without `source`; none where the later value
            is the source's, up to copies and views.
        cuts: those of them that everything passes: the values of the carrier on its way.
    """

    source: fx.Node
    nodes: tuple[fx.Node, ...]
    cuts: tuple[fx.Node, ...]


def alteration_between(
    view: Dataflow, reads: Reads, source: fx.Node, end: fx.Node
) -> Alteration | None:
    """The alteration that makes the value `end` of the value `source`.

    None where `end` does not depend on `source`, or not by operations that keep every element in
    its place, or where an inner value that is no value of the carrier is read by others, or where
    the carrier is detached (gradients would go round that); nor of the several results of an
    operator.
    """
    if end is source:  # which may be a write in place that gives no value of its own
        return Alteration(source, (), ())
    if not is_tensor(source):
        return None
    nodes = _nodes_between(view, source, end)
    if not nodes or not all(map(keeps_form, nodes)) or not reads.turns.isdisjoint(nodes):
        return None
    values = [node for node in nodes if reads.origin(node) is node]
    cuts = _cuts(reads, source, values)
    if any(ops.operation(cut) == "detach" for cut in cuts):
        return None
    inner = {*nodes}
    for value in values:
        if value not in cuts and any(read.user not in inner for read in reads.of(value)):
            return None
    in_place = _elements_in_place(reads, source, values)
    read = [cut for cut in cuts if any(r.user not in inner for r in reads.of(cut))]
    if not all(value in in_place for value in (*read, end)):
        return None
    return Alteration(source, nodes, cuts)


def keeps_form(node: fx.Node) -> bool:
    """Whether a node may be a part of an alteration: element-wise, a norm or a piece of one."""
    name = ops.operation(node)
    if name in ops.NORMS | ops.STATISTICS | ops.RESHAPES | ops.PERMUTATIONS:
        return True
    if name == "getitem":  # of the results of an operator, not of a tensor
        return not is_tensor(node.args[0])
    return name not in ops.REARRANGEMENTS and ops.is_elementwise(node)


def walk_up_alterations(
    operand: fx.Node, user: fx.Node, reads: Reads
) -> Iterator[tuple[fx.Node, fx.Node]]:
    """From the skip operand of an addition back over scalings, dropout, narrowing casts, slices...

    Yields each altering node, which may be a write in place, with the value it is applied to.
    """
    current = reads.value_read(operand, user)
    for _ in range(LONGEST_INTERRUPTION):
        source = _altered(current)
        if source is None:
            return
        below, current = current, reads.value_read(source, current)
        yield below, current


def is_scale(node: fx.Node) -> bool:
    """Parameters and inputs as they were given, or what is made of them element by element."""
    pending = [node]
    for seen, current in enumerate(pending):
        if seen == _MOST_NODES_OF_A_SCALE or not ops.is_elementwise(current):
            return False
        if not ops.is_constant(current):
            pending += [part for part in ops.tensor_arguments(current) if part not in pending]
    return True


def scales_operand(node: fx.Node, operand: fx.Node) -> bool:
    """Whether the addition multiplies this operand: ``torch.add(branch, skip, alpha=0.5)``.

    Or negates it: ``branch - skip``.
    """
    second = operand is ops.operands(node)[1]
    name, factor = ops.operation(node), ops.argument(node, 2, "alpha", 1)
    return second and (name == "sub" or (name == "add" and factor != 1))


def largest_part(node: fx.Node) -> fx.Node | None:
    """Where most of the elements come from that an operation puts together; from no weights."""
    parts = ops.value_arguments(node)
    parts = [part for part in parts if not ops.is_constant(part)] or parts
    return max(parts, key=num_elements) if parts else None


def num_elements(node: fx.Node) -> int:
    return math.prod(shape_of(node)) if is_tensor(node) else 0


def _nodes_between(view: Dataflow, source: fx.Node, end: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes on all paths from `source` to `end`, `end` included; none if there are too many."""
    pending, above = [end], {end}
    for node in pending:
        if len(pending) > _MOST_NODES_BETWEEN:
            return ()
        for part in view.flow.predecessors(node):
            if part not in above and view.order[part] > view.order[source]:
                above.add(part)
                pending.append(part)
    reached = {source}
    for node in sorted(above, key=view.order.__getitem__):
        if any(part in reached for part in view.flow.predecessors(node)):
            reached.add(node)
    if end not in reached:
        return ()
    return tuple(sorted(reached - {source}, key=view.order.__getitem__))


def _cuts(reads: Reads, source: fx.Node, values: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    """The values that no use of an earlier value by a later one goes round."""
    position = {value: index for index, value in enumerate((source, *values))}
    last_use = [0] * len(position)
    for value in values:
        for part in _values_used(reads, value):
            if part in position:
                last_use[position[part]] = max(last_use[position[part]], position[value])
    cuts, farthest = [], 0
    for value, index in position.items():
        if farthest <= index and value is not source:
            cuts.append(value)
        farthest = max(farthest, last_use[index])
    return tuple(cuts)


def _elements_in_place(reads: Reads, source: fx.Node, values: Sequence[fx.Node]) -> set[fx.Node]:
    """The values whose elements are the source's, one by one and in the same order."""
    orders: dict[fx.Node, Order] = {source: tuple(range(len(shape_of(source))))}
    for value in values:
        order = _order_of(reads, value, orders)
        if order is not None:
            orders[value] = order
    whole = num_elements(source)
    return {v for v, o in orders.items() if o == tuple(sorted(o)) and num_elements(v) == whole}


def _order_of(reads: Reads, value: fx.Node, orders: dict[fx.Node, Order]) -> Order | None:
    """Which dimension of the source each dimension of a value is; None where that is lost."""
    parts = [part for part in _values_used(reads, value) if part in orders]
    found = {orders[part] for part in parts}
    if not parts or len(found) > 1:
        return None
    (order,) = found
    moved = ops.permutation(value)
    if moved is not None:
        same_rank = len(moved) == len(order)
        return tuple(order[dimension] for dimension in moved) if same_rank else None
    if not is_tensor(value) or not is_tensor(parts[0]):
        return order  # the results of an operator, or the first of them
    if order == tuple(sorted(order)) and num_elements(value) == num_elements(parts[0]):
        return tuple(range(len(shape_of(value))))
    return order if shape_of(value) == shape_of(parts[0]) else None


def _values_used(reads: Reads, node: fx.Node) -> list[fx.Node]:
    return [
        reads.value_read(part, node) if is_tensor(part) else part
        for part in ops.value_arguments(node)
    ]


def _altered(node: fx.Node) -> fx.Node | None:
    """What a constant scale, dropout, a cast, a detachment or a rearrangement is applied to."""
    name = ops.operation(node)
    if name in ops.REARRANGEMENTS:
        return largest_part(node)
    operands = ops.operands(node)
    if name in ops.DROPOUTS | {"detach"} or (name in ops.CASTS and operands):
        return operands[0]
    if name not in ("mul", "div", "neg"):
        return None  # also of what gives no value, as `x[i] = y` does
    same = [operand for operand in operands if shape_of(operand) == shape_of(node)]
    if len(same) != 1:
        return None
    constant = all(operand is same[0] or is_scale(operand) for operand in operands)
    return same[0] if constant else None
