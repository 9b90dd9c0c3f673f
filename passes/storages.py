"""Which values of an ATen graph lie in the same memory, and until when they are read."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from attnres_compile.passes.cpp_calls import phase_of
from attnres_compile.passes.graph_values import value_of

_aten = torch.ops.aten
MAKE_ROOM = (_aten.empty_like.default, _aten.empty.memory_format)


class Storages:
    """The memory of a sorted graph, as far as its nodes tell."""

    def __init__(self, graph: fx.Graph) -> None:
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self.sharing: dict[fx.Node, set[fx.Node]] = {}
        for node in graph.nodes:
            self.sharing[node] = {node}
            for argument in node.all_input_nodes if _may_alias(node) else ():
                self.unite(node, argument)

    def unite(self, one: fx.Node, other: fx.Node) -> None:
        fewer, more = sorted((self.sharing[one], self.sharing[other]), key=len)
        if fewer is more:
            return
        more |= fewer
        self.sharing |= dict.fromkeys(fewer, more)

    def may_hold(self, room: Any, old: Any, call: fx.Node) -> bool:
        """Whether the memory of `old`, an argument of `call`, may be what it writes to."""
        if not isinstance(room, fx.Node) or not isinstance(old, fx.Node):
            return False
        if room.target not in MAKE_ROOM or not are_alike(room, old):
            return False
        sharing = self.sharing[old]
        # Memory from elsewhere is not ours to write to; another argument in it may be read later.
        if any(each.op != "call_function" for each in sharing):
            return False
        if sum(each in sharing for each in pytree.tree_leaves(call.args)) > 1:
            return False
        return self.lifetime(old)[1] <= self.position[call]

    def leaves(self, value: fx.Node) -> bool:
        """Whether it is returned, to be kept by somebody."""
        return any(user.op == "output" for each in self.sharing[value] for user in each.users)

    def lifetime(self, value: fx.Node) -> tuple[int, int]:
        """The positions of the first and the last who read or write its memory."""
        places = [self.position[user] for each in self.sharing[value] for user in each.users]
        return min(places), max(places)


def are_alike(room: fx.Node, old: fx.Node) -> bool:
    """Whether a value fits into another's memory, row by row."""
    new, value = value_of(room), value_of(old)
    same = new.shape == value.shape and new.dtype == value.dtype
    return bool(same and value.is_contiguous())


def _may_alias(node: fx.Node) -> bool:
    """Whether a result may be in the memory of an argument. So it may where there is no schema."""
    if node.op != "call_function" or phase_of(node) is not None:
        return False
    if not isinstance(node.target, OpOverload) or node.target is _aten.reshape.default:
        return True
    return any(result.alias_info for result in node.target._schema.returns)
