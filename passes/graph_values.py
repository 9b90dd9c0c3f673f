"""What a graph node says about itself: its value, its shape, the module calls it was traced in.

The same questions have different answers in a graph from Dynamo (`example_value`), from
torch.export (`val`) and from a shape propagation (`tensor_meta`); everything downstream asks here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.source import is_from_unspecialized_param_buffer_source

MODULE_CALLS = "attnres_module_calls"
"""Key of `node.meta` under which capture records the module calls around a node."""

SOURCE = "attnres_source"
"""Key of `node.meta` for a graph that knows its nodes by names, and no lines of a program."""

WEIGHT = "attnres_weight"
"""Key of `node.meta` of a placeholder that stands for a parameter or buffer of an export."""

CONSTANT = "attnres_constant"
"""Key of `node.meta` of a placeholder for the tensor that an export lifted out of the program."""

CALLERS = ("attnres_compile/capture.py", "attnres_compile/execution.py")
"""Files that call the user's program: their lines tell nothing of it."""

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')


@dataclass(frozen=True)
class ModuleCall:
    """One call of one module: its path in the model, and a key that tells its calls apart."""

    path: str
    call: str


def value_of(node: fx.Node) -> Any:
    """The example value of a node: a (fake) tensor, a container of them, a number, or None."""
    for key in ("val", "example_value"):
        if key in node.meta:
            return node.meta[key]
    return node.meta.get("tensor_meta")


def is_tensor(node: object) -> bool:
    return isinstance(node, fx.Node) and hasattr(value_of(node), "dtype")


def is_weight(node: fx.Node) -> bool:
    """A parameter or buffer of the model, whatever holds it; not an input of the call."""
    if node.op != "placeholder":
        return node.op == "get_attr"
    source = getattr(node, "_dynamo_source", None)
    return (
        WEIGHT in node.meta
        or CONSTANT in node.meta
        or isinstance(value_of(node), nn.Parameter)
        or (source is not None and is_from_unspecialized_param_buffer_source(source))
    )


def dtype_of(node: fx.Node) -> torch.dtype:
    dtype = value_of(node).dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The sizes of a tensor node; a symbolic size counts as the size it was traced with."""
    return tuple(size_hint(size) for size in value_of(node).shape)


def strides_of(node: fx.Node) -> tuple[int, ...]:
    value = value_of(node)
    strides = value.stride() if callable(value.stride) else value.stride
    return tuple(size_hint(stride) for stride in strides)


def size_hint(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return -1 if hint is None else int(hint)


def module_calls(node: fx.Node) -> tuple[ModuleCall, ...]:
    """The module calls around a node, outermost first; empty where the graph does not know."""
    calls: tuple[ModuleCall, ...] = node.meta.get(MODULE_CALLS, ())
    return calls


def module_path(node: fx.Node) -> str:
    """Path of the innermost module a node was traced in; the root's is the empty string."""
    calls = module_calls(node)
    return calls[-1].path if calls else ""


def source_line(node: fx.Node) -> str:
    """Where the user's program made this node, as ``file.py:123``; empty where unknown.

    The name of the node, in a graph that was not traced from a program.
    """
    if SOURCE in node.meta:
        return str(node.meta[SOURCE])
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    frames = [frame for frame in frames if not frame["file"].endswith(CALLERS)]
    if not frames:
        return ""
    frame = frames[-1]
    return f"{frame['file'].rsplit('/', 1)[-1]}:{frame['line']}"


def functions_around(node: fx.Node) -> set[str]:
    """Names of the Python functions a node was traced through."""
    return {frame["function"] for frame in _FRAME.finditer(node.meta.get("stack_trace") or "")}
