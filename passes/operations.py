"""What an FX node does, in one vocabulary for torch-level, ATen and symbolically traced graphs.

Every table about operators stands in this file: which are views, casts, element-wise, norms, which
write into their argument. A name is ATen's (``add``, ``layer_norm``), whichever way it was spelled:
``operator.iadd``, ``Tensor.add_``, ``torch.add`` and ``aten.add_.Tensor`` are all ``add``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import fx, nn

from attnres_compile.passes.graph_values import (
    dtype_of,
    is_tensor,
    shape_of,
    strides_of,
    value_of,
)

ADDITIONS = frozenset({"add", "sub", "addcmul"})
CASTS = frozenset(
    "to float half bfloat16 double type type_as _to_copy prims_convert_element_type".split()
)
COPIES = frozenset("contiguous clone alias lift_fresh_copy identity".split())
RESHAPES = frozenset(
    "view reshape _unsafe_view flatten unflatten squeeze unsqueeze view_as reshape_as".split()
)
PERMUTATIONS = frozenset("transpose permute movedim swapaxes swapdims t T mT".split())
SLICES = frozenset(
    "getitem select slice narrow chunk split split_with_sizes unbind tensor_split expand expand_as"
    " broadcast_to".split()
)
REARRANGEMENTS = RESHAPES | PERMUTATIONS | SLICES | {"cat", "stack"}
DROPOUTS = frozenset(
    "dropout native_dropout alpha_dropout feature_dropout feature_alpha_dropout dropout1d dropout2d"
    " dropout3d".split()
)
FACTORIES = frozenset(
    "zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones"
    " new_empty new_full new_tensor size sym_size stride shape numel dim ndim device dtype"
    " bernoulli storage_offset sym_stride sym_numel is_contiguous is_floating_point _assert"
    " _assert_async _assert_scalar _assert_tensor_metadata".split()
)
"""Operators whose result does not carry the values of their tensor argument."""

SCALE_INVARIANT_NORMS = frozenset(
    "layer_norm rms_norm group_norm instance_norm native_layer_norm native_group_norm normalize"
    " _fused_rms_norm".split()
)
NORMS = SCALE_INVARIANT_NORMS | {
    "batch_norm",
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "local_response_norm",
}
STATISTICS = frozenset(
    "mean sum var std var_mean std_mean amax amin norm linalg_norm linalg_vector_norm".split()
)
"""Reductions that a norm written in steps divides by."""
PROJECTIONS = frozenset(
    "linear matmul mm bmm addmm baddbmm einsum tensordot bilinear conv1d conv2d conv3d convolution"
    " _convolution conv_transpose1d conv_transpose2d conv_transpose3d scaled_dot_product_attention"
    " _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention"
    " multi_head_attention_forward multiheadattention".split()
)
"""Operators that multiply by a matrix: of weights, or of attention."""
ACTIVATIONS = frozenset(
    "relu relu6 gelu silu mish elu celu selu leaky_relu prelu hardswish hardtanh hardsigmoid tanh"
    " sigmoid softplus softsign logsigmoid threshold glu".split()
)
CLAMPS = frozenset("clamp clamp_min clamp_max clip".split())
QUANTIZERS = frozenset(
    "fake_quantize_per_tensor_affine fake_quantize_per_channel_affine quantize_per_tensor"
    " quantize_per_channel dequantize quantize_affine dequantize_affine".split()
)
_SHAPE_FROM_OTHER = frozenset("view_as reshape_as type_as expand_as".split())
_ALIASING = (
    RESHAPES
    | PERMUTATIONS
    | SLICES
    | (CASTS - {"_to_copy"})
    | {"contiguous", "alias", "identity", "detach", "diagonal", "unfold", "as_strided"}
)
_POINTWISE_EXTRA = (
    CASTS
    | COPIES
    | RESHAPES
    | PERMUTATIONS
    | SLICES
    | DROPOUTS
    | QUANTIZERS
    | CLAMPS
    | {"detach", "drop_path", "stochastic_depth", "glu", "where", "square", "prelu", "real", "imag"}
)
_OPERATOR_NAMES = {
    "truediv": "div",
    "and_": "bitwise_and",
    "or_": "bitwise_or",
    "concat": "cat",
    "numpy_T": "T",
    "_get_data_attr": "detach",
}
_POINTWISE_MODULES: tuple[type[nn.Module], ...] = (
    nn.Identity,
    nn.modules.dropout._DropoutNd,
    nn.Flatten,
    nn.Unflatten,
)


def operation(node: fx.Node) -> str:
    """ATen's name of what a node computes; its FX opcode for nodes that compute nothing."""
    if node.op == "call_module":
        return _module_operation(_called_module(node))
    if node.op not in ("call_function", "call_method"):
        return node.op
    if node.target is getattr:
        return _canonical_name(str(node.args[1]))
    return _canonical_name(_raw_name(node.target))


def is_addition(node: fx.Node) -> bool:
    return operation(node) in ADDITIONS and is_tensor(node)


def is_elementwise(node: fx.Node) -> bool:
    """Whether each output element depends on one element (per operand): no mixing."""
    if node.op == "call_module":
        module = _called_module(node)
        return isinstance(module, _POINTWISE_MODULES) or _is_activation_module(module)
    return node.op not in ("call_function", "call_method") or _is_pointwise_name(operation(node))


def mixes_elements(node: fx.Node) -> bool:
    return not is_elementwise(node)


def is_projection(node: fx.Node) -> bool:
    return operation(node) in PROJECTIONS


def is_constant(node: fx.Node) -> bool:
    """A parameter, a buffer or an input as it was given, up to views."""
    while operation(node) in RESHAPES | SLICES and tensor_arguments(node):
        node = tensor_arguments(node)[0]
    return node.op in ("placeholder", "get_attr")


def is_value_preserving(node: fx.Node) -> bool:
    """A copy, or a cast that loses nothing: the node's value equals its argument's."""
    name = operation(node)
    if name in COPIES or _changes_nothing(node):
        return True
    if name not in CASTS or not is_tensor(node) or not tensor_arguments(node):
        return False
    source = tensor_arguments(node)[0]
    before, after = dtype_of(source), dtype_of(node)
    same_device = value_of(source).device == value_of(node).device if _has_device(node) else True
    return same_device and _keeps_precision(before, after)


_NEUTRAL = {"add": 0, "sub": 0, "mul": 1, "div": 1}


def _changes_nothing(node: fx.Node) -> bool:
    """``0 + x``, as Python's ``sum`` starts, ``x - 0``, ``x * 1``: the same value and dtype."""
    neutral = _NEUTRAL.get(operation(node))
    values = operands(node) if neutral is not None else []
    if len(values) != 1 or len(node.args) != 2 or dtype_of(node) != dtype_of(values[0]):
        return False
    number = node.args[1] if node.args[0] is values[0] else node.args[0]
    turned = number is node.args[0] and operation(node) in ("sub", "div")
    return isinstance(number, int | float) and number == neutral and not turned


def _keeps_precision(before: torch.dtype, after: torch.dtype) -> bool:
    """A widening cast; or float64 to float32, the dtype that some models name for their carrier.

    Such a model (Mamba's ``residual_in_fp32``) is one stream in every dtype it is trained in; in
    float64, which is for checking, its own rounding stays visible at 1e-7.
    """
    carrier = before == torch.float64 and after == torch.float32
    return carrier or torch.promote_types(before, after) == after


def is_reshape(node: fx.Node) -> bool:
    """A view or reshape that keeps the order of the elements."""
    return operation(node) in RESHAPES and is_tensor(node) and bool(tensor_arguments(node))


def permutation(node: fx.Node) -> tuple[int, ...] | None:
    """Which input dimension each output dimension is, of a transposition; None for other nodes."""
    name = operation(node)
    if name not in PERMUTATIONS or not tensor_arguments(node):
        return None
    rank = len(shape_of(tensor_arguments(node)[0]))
    # The size of each dimension is its label.
    labelled = torch.empty(tuple(range(2, 2 + rank)), device="meta")
    moved = getattr(labelled, name)
    if callable(moved):  # not .T and .mT
        moved = moved(*node.args[1:], **node.kwargs)
    return tuple(size - 2 for size in moved.shape)


def writes_into(node: fx.Node) -> fx.Node | None:
    """The tensor that a node overwrites; None for a node that only computes."""
    arguments = tensor_arguments(node)
    if node.op == "call_module":
        written = bool(arguments) and getattr(_called_module(node), "inplace", False)
        return arguments[0] if written else None
    if node.op not in ("call_function", "call_method"):
        return None
    out = node.kwargs.get("out")
    if isinstance(out, fx.Node):
        return out
    if not arguments or not _is_inplace(node):
        return None
    return arguments[0]


def overwritten(node: fx.Node) -> list[fx.Node]:
    """All tensors that a node overwrites: those of a list, as ``torch._foreach_mul_`` takes it."""
    written = writes_into(node)
    if written is None:
        return []
    listed = node.args[0] if node.args else None
    if isinstance(listed, (list, tuple)) and written in listed:
        return [each for each in listed if is_tensor(each)]
    return [written]


def aliases_argument(node: fx.Node) -> bool:
    """Whether a node's result may share memory with its first tensor argument."""
    name, arguments = operation(node), tensor_arguments(node)
    if name not in _ALIASING or not arguments:
        return False
    if name in CASTS and is_tensor(node):
        return dtype_of(node) == dtype_of(arguments[0])
    if name == "contiguous":
        return strides_of(node) == strides_of(arguments[0])
    return True


def tensor_arguments(node: fx.Node) -> list[fx.Node]:
    return [argument for argument in node.all_input_nodes if is_tensor(argument)]


def operands(node: fx.Node) -> list[fx.Node]:
    """The tensor operands of an arithmetic node in order; one that stands twice counts twice."""
    return [value for value in (*node.args, *node.kwargs.values()) if is_tensor(value)]  # type: ignore[misc]


def value_arguments(node: fx.Node) -> list[fx.Node]:
    """The inputs whose values (not only shapes or dtypes) reach the node's result."""
    name = operation(node)
    if name in FACTORIES:
        return []
    inputs = node.all_input_nodes
    if name in _SHAPE_FROM_OTHER:
        inputs = inputs[:1]
    return [argument for argument in inputs if _carries_tensors(value_of(argument))]


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def _carries_tensors(value: object) -> bool:
    """False for sizes and other plain numbers; true for tensors and for unknown values."""
    return not isinstance(value, int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool)


def _raw_name(target: Any) -> str:
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name).split("::")[1]
    return str(getattr(target, "__name__", target))


@cache
def _canonical_name(name: str) -> str:
    stripped = name
    if name.startswith("__") and name.endswith("__"):
        stripped = name.strip("_")
    elif name.endswith("_") and len(name) > 1:
        stripped = name.rstrip("_")
    if _is_inplace_operator(name):
        stripped = stripped[1:]
    if stripped in ("radd", "rmul"):
        stripped = stripped[1:]
    return _OPERATOR_NAMES.get(stripped, stripped)


def _is_inplace_operator(name: str) -> bool:
    return name.strip("_") in ("iadd", "isub", "imul", "itruediv", "ipow", "iand", "ior")


@cache
def _is_pointwise_name(name: str) -> bool:
    if name in _POINTWISE_EXTRA:
        return True
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return False
    return any(
        torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()
    )


def _is_inplace(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        first = node.target._schema.arguments[:1]
        return bool(first and first[0].alias_info and first[0].alias_info.is_write)
    name = _raw_name(node.target)
    if name in ("setitem", "index_put_", "copy_") or _is_inplace_operator(name):
        return True
    if node.op == "call_method" and name in ("__iadd__", "__setitem__"):
        return True
    if name.endswith("_") and not name.endswith("__"):
        return True
    return bool(_bound_argument(node, "inplace"))


def _bound_argument(node: fx.Node, name: str) -> Any:
    """A parameter of a Python function by name, wherever the call put it; None when absent."""
    if name in node.kwargs:
        return node.kwargs[name]
    if node.op != "call_function" or not callable(node.target):
        return None
    names = _parameter_names(node.target)
    if name not in names or names.index(name) >= len(node.args):
        return None
    return node.args[names.index(name)]


@cache
def _parameter_names(function: Callable[..., Any]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # builtins without a signature have no `inplace` either
        return ()


def _has_device(node: fx.Node) -> bool:
    return hasattr(value_of(node), "device")


def _called_module(node: fx.Node) -> nn.Module:
    owner = node.graph.owning_module
    assert owner is not None, f"call_module node {node} stands in a graph without a module"
    return owner.get_submodule(str(node.target))


def _is_activation_module(module: nn.Module) -> bool:
    mixing = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, nn.MultiheadAttention)
    return type(module).__module__ == "torch.nn.modules.activation" and not isinstance(
        module, mixing
    )


def _module_operation(module: nn.Module) -> str:
    if isinstance(module, nn.Identity):
        return "identity"
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "batch_norm"
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return "dropout"
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return "instance_norm"
    if isinstance(module, nn.modules.conv._ConvNd):
        return f"conv{type(module).__name__[-2]}d"
    snake = {"LayerNorm": "layer_norm", "RMSNorm": "rms_norm", "GroupNorm": "group_norm"}
    name = type(module).__name__
    return snake.get(name, name.lower())
