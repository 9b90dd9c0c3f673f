"""The shapes of a call's inputs, as JSON: enough to make up inputs like those of the example."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnres_compile.errors import CheckpointError

_LARGEST = 1 << 28  # elements; a description is as untrusted as the file that it stands in
_PLAIN = (bool, int, float, str, type(None))

CallShapes = dict[str, Any]


def describe_call(args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> CallShapes | None:
    """Shapes, dtypes and plain values of a call; None where it holds anything else.

    Example:
        >>> describe_call((torch.zeros(2, 3),), {"use_cache": False})["args"]
        [{'shape': [2, 3], 'dtype': 'float32'}]
    """
    try:
        named = {name: _describe(value) for name, value in (kwargs or {}).items()}
        return {"args": [_describe(value) for value in args], "kwargs": named}
    except TypeError:
        return None


def make_up_call(
    shapes: CallShapes, *, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Random inputs of the described shapes; integers stay below the largest that was seen.

    Raises:
        CheckpointError: the description is not one that `describe_call` makes.

    Example:
        >>> args, _ = make_up_call({"args": [{"shape": [2], "dtype": "float32"}], "kwargs": {}})
        >>> args[0].shape
        torch.Size([2])
    """
    generator = torch.Generator().manual_seed(seed)
    try:
        args = tuple(_make_up(value, generator, device) for value in shapes["args"])
        kwargs = {str(k): _make_up(v, generator, device) for k, v in shapes["kwargs"].items()}
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"the recorded input shapes cannot be read ({error}); give the inputs themselves."
        ) from error
    return args, kwargs


def _describe(value: Any) -> Any:
    if isinstance(value, Tensor):
        described: dict[str, Any] = {"shape": list(value.shape), "dtype": str(value.dtype)[6:]}
        counts = not value.is_floating_point() and value.dtype != torch.bool
        if counts and value.device.type != "meta" and value.numel():
            described["below"] = int(value.max()) + 1
        return described
    if isinstance(value, list | tuple):
        return [_describe(each) for each in value]
    if isinstance(value, _PLAIN):
        return value
    raise TypeError(type(value).__name__)


def _make_up(value: Any, generator: torch.Generator, device: torch.device | str) -> Any:
    if isinstance(value, list):
        return [_make_up(each, generator, device) for each in value]
    if not isinstance(value, dict):
        return value
    shape = [int(size) for size in value["shape"]]
    dtype = getattr(torch, value["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{value['dtype']} is no dtype")
    if math.prod(shape) > _LARGEST or any(size < 0 for size in shape):
        raise ValueError(f"shape {shape}")
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator).to(device, dtype)
    if dtype == torch.bool:
        return torch.ones(shape, dtype=torch.bool, device=device)
    below = max(int(value.get("below", 1)), 1)
    return torch.randint(0, below, shape, generator=generator).to(device, dtype)
