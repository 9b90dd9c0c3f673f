"""Let C++ write over what nobody reads after it.

A site has read a row by the time it writes those that are made of it, so its results can go where
its arguments were: to lines that are in the cache already, and not to memory that has to be found
first. Inductor does this for loops that it generates itself. ``realize_rows.py`` sees to it that
those that read what is written over come before.

Contract: values are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from attnres_compile.passes.cpp_calls import arguments_of, phase_of
from attnres_compile.passes.graph_values import value_of

_aten = torch.ops.aten
_MAKE_ROOM = (_aten.empty_like.default, _aten.empty.memory_format)


def write_in_place(graph: fx.Graph) -> None:
    """Rewrites, in place, a sorted ATen graph with the operators of ``cpp_library.py``."""
    calls = [node for node in graph.nodes if phase_of(node) is not None]
    storages = _Storages(graph)
    for call in calls:
        for room, candidates in _results(call):
            old = next((each for each in candidates if storages.may_hold(room, each, call)), None)
            if old is not None:
                storages.unite(room, old)
                room.replace_all_uses_with(old)
                graph.erase_node(room)


def _results(call: fx.Node) -> Iterator[tuple[Any, list[Any]]]:
    """What a call writes to, and the arguments of which it has read a row before it writes it."""
    given = arguments_of(call)
    match phase_of(call):
        case "complete":
            yield given["sum"], [given["sources"][-1], given["branch"]]
        case "complete_backward":
            yield given["grad"], [given["grad_source"]]
        case "phase2":
            yield given["partial"], [given["sources"][-1], given["branch"]]
            yield given["mixed"], [given["branch"]]
            yield given["normed"], [given["branch"]]
        case "phase1_backward" | "phase2_backward":
            arriving = dict(zip(given["arrived"], given["arriving"], strict=True))
            others = [given.get("grad_normed"), given.get("grad_mixed")]
            for source, room in zip(given["wanted"], given["grads"], strict=True):
                yield room, [arriving.get(source), *others]


class _Storages:
    """Which values of a graph are in the same memory, and until when they are read."""

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
        if room.target not in _MAKE_ROOM or not _alike(room, old):
            return False
        sharing = self.sharing[old]
        # Memory from elsewhere is not ours to write to; another argument in it may be read later.
        if any(each.op != "call_function" for each in sharing):
            return False
        if sum(each in sharing for each in pytree.tree_leaves(call.args)) > 1:
            return False
        last = max(self.position[user] for each in sharing for user in each.users)
        return last <= self.position[call]


def _may_alias(node: fx.Node) -> bool:
    """Whether a result may be in the memory of an argument. So it may where there is no schema."""
    if node.op != "call_function" or phase_of(node) is not None:
        return False
    if not isinstance(node.target, OpOverload) or node.target is _aten.reshape.default:
        return True
    return any(result.alias_info for result in node.target._schema.returns)


def _alike(room: fx.Node, old: fx.Node) -> bool:
    """Whether a value fits into another's memory, row by row."""
    new, value = value_of(room), value_of(old)
    same = new.shape == value.shape and new.dtype == value.dtype
    return bool(same and value.is_contiguous())
