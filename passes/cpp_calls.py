"""Calls of the C++ library in an ATen graph, with their arguments by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from attnres_compile.kernels.cpp_library import DTYPES, NAMES


def phase_of(node: fx.Node) -> str | None:
    """Which function of the library a node calls: ``"phase2"``."""
    if not isinstance(node.target, OpOverload):
        return None
    name = node.target._schema.name.removeprefix("attnres::cpp_")
    return name if name in NAMES else None


def dtypes_of(graph: fx.Graph) -> set[torch.dtype]:
    """Of the streams whose calls stand in a graph: for these the library is there."""
    calls: list[Any] = [node.target for node in graph.nodes if phase_of(node) is not None]
    names = {target._overloadname for target in calls}
    return {dtype for dtype, name in DTYPES.items() if name in names}


def arguments_of(call: fx.Node) -> dict[str, Any]:
    return dict(zip(_names(call), call.args, strict=True))


def written_by(call: fx.Node, args: Sequence[Any] | None = None) -> list[Any]:
    """The memory that a call writes to, among its arguments or what was made of them, `args`."""
    target: Any = call.target
    args = call.args if args is None else args
    results = [i for i, each in enumerate(target._schema.arguments) if each.alias_info is not None]
    rooms = pytree.tree_leaves([args[i] for i in results])
    return [room for room in rooms if room is not None]


def set_argument(call: fx.Node, name: str, argument: Any) -> None:
    call.update_arg(_names(call).index(name), argument)


def _names(call: fx.Node) -> list[str]:
    target: Any = call.target
    return [argument.name for argument in target._schema.arguments]
