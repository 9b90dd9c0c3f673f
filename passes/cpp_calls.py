"""Calls of the C++ phases in an ATen graph, with their arguments by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx


def arguments_of(call: fx.Node) -> dict[str, Any]:
    return dict(zip(_names(call), call.args, strict=True))


def set_argument(call: fx.Node, name: str, argument: Any) -> None:
    call.update_arg(_names(call).index(name), argument)


def value_of(node: Any) -> Tensor:
    """The example of what a node computes: its shape, strides and dtype."""
    value: Tensor = node.meta["val"]
    return value


def _names(call: fx.Node) -> list[str]:
    target: Any = call.target
    return [argument.name for argument in target._schema.arguments]
