"""Calls of the C++ phases in an ATen graph, with their arguments by name."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._ops import OpOverload

from attnres_compile.kernels.cpp_library import NAMES


def phase_of(node: fx.Node) -> str | None:
    """Which function of the library a node calls: ``"phase1"``."""
    if not isinstance(node.target, OpOverload):
        return None
    name = node.target._schema.name.removeprefix("attnres::cpp_")
    return name if name in NAMES else None


def arguments_of(call: fx.Node) -> dict[str, Any]:
    return dict(zip(_names(call), call.args, strict=True))


def set_argument(call: fx.Node, name: str, argument: Any) -> None:
    call.update_arg(_names(call).index(name), argument)


def _names(call: fx.Node) -> list[str]:
    target: Any = call.target
    return [argument.name for argument in target._schema.arguments]
