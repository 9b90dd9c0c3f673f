"""Take out of calls of the C++ library what it can do without, each a line of Python less.

Between matrices nothing of the interpreter is left in the caches, and a line of the code that
Inductor writes takes microseconds: a view of every source of every site, a loop over a few hundred
numbers for every query, a tensor for statistics that only a backward pass would read. The library
takes rows in any shape, multiplies a query with its gain, and keeps what nobody wants to itself.

Contract: values are the same bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree

from attnres_compile.passes.cpp_calls import arguments_of, phase_of, set_argument, written_by
from attnres_compile.passes.graph_values import is_tensor, value_of

_aten = torch.ops.aten
_VIEWS = (_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default)
# What is only read, row by row. What any call writes to keeps the node that its readers know.
_READ = ("branch", "grad_mixed", "grad_mixes", "grad_normed", "grad_source", "sources", "arriving")


def trim_calls(graph: fx.Graph) -> None:
    """Rewrites, in place, a sorted ATen graph with the operators of ``cpp_library.py``."""
    calls = [node for node in graph.nodes if phase_of(node) is not None]
    written = {room for call in calls for room in written_by(call)}
    for call in calls:
        _read_without_views(call, written)
        if phase_of(call) == "phase2":
            _take_gain(call)
            _forget(call, "saved")
        if phase_of(call) == "phase1":
            _forget(call, "weights")


def _read_without_views(call: fx.Node, written: set[fx.Node]) -> None:
    arguments = arguments_of(call)
    for name in _READ:
        given = arguments.get(name)
        bare = pytree.tree_map_only(
            fx.Node, lambda rows: rows if rows in written else _without_view(rows), given
        )
        if bare != given:
            set_argument(call, name, bare)


def _without_view(rows: fx.Node) -> fx.Node:
    """What has the same rows in the same memory, perhaps in another shape."""
    if rows.target not in _VIEWS:
        return rows
    base: Any = rows.args[0]
    old, new = value_of(base), value_of(rows)
    same = old.dim() > 0 and statically_known_true(old.shape[-1] == new.shape[-1])
    return base if same and old.is_contiguous() and new.is_contiguous() else rows


def _take_gain(call: fx.Node) -> None:
    product: Any = arguments_of(call)["query"]
    if product.target is not _aten.mul.Tensor or len(product.users) > 1:
        return
    if not all(is_tensor(factor) for factor in product.args):
        return
    query, gain = product.args
    if all(_alike(value_of(factor), value_of(product)) for factor in (query, gain)):
        set_argument(call, "query", query)
        set_argument(call, "gain", gain)


def _alike(factor: Tensor, product: Tensor) -> bool:
    same = factor.shape == product.shape and factor.dtype == product.dtype
    return same and factor.is_contiguous()


def _forget(call: fx.Node, name: str) -> None:
    """Does without a result that nobody else reads."""
    room: Any = arguments_of(call)[name]
    if room is not None and len(room.users) == 1:
        set_argument(call, name, None)
