"""One run of a model with its gradients, and the comparison of two such runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attnres_compile.kernels.reference import arithmetic_dtype

_SEED = 0

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """One tensor of the original and its counterpart.

    Attributes:
        dtype: of the run, as ``float32``.
        kind: an output of the model, or the gradient of one of its parameters.
        name: of the output (``logits``) or the parameter.
        absolute: the largest difference; nan if the tensor holds nan, inf if there is no
            counterpart of the same shape and dtype.
        relative: the same over the largest magnitude expected, for a gradient over at least
            `gradient_floor` of the model's largest.
        tolerance: how large `relative` may be.
    """

    dtype: str
    kind: Literal["output", "gradient"]
    name: str
    absolute: float
    relative: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.relative <= self.tolerance


@dataclass(frozen=True)
class Run:
    """What one call of a model gave.

    Attributes:
        outputs: all tensors that it returned, by name.
        gradients: by parameter that requires one; None where the outputs do not depend on it.
    """

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor | None]

    def cast_like(self, other: Run) -> Run:
        """The same numbers in the dtypes of another run."""
        outputs, gradients = dict(self.outputs), dict(self.gradients)
        for name, output in other.outputs.items():
            if name in outputs:
                outputs[name] = outputs[name].to(output.dtype)
        for name, grad in other.gradients.items():
            mine = gradients.get(name)
            if mine is not None and grad is not None:
                gradients[name] = mine.to(grad.dtype)
        return Run(outputs, gradients)


def run(model: nn.Module, args: Args, kwargs: Kwargs) -> Run:
    """One call after a fixed seed, and its gradients; `model` is the caller's own copy."""
    args, kwargs = _cloned((args, dict(kwargs)))
    model.zero_grad(set_to_none=True)
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(_SEED)
        outputs = dict(named_tensors(model(*args, **kwargs)))
        loss = _projection(list(outputs.values()))
        if loss is not None:
            torch.autograd.backward(loss)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return Run(
        outputs={name: output.detach() for name, output in outputs.items()},
        gradients={n: None if p.grad is None else _dense(p.grad) for n, p in trained.items()},
    )


def _projection(outputs: list[Tensor]) -> Tensor | None:
    """A random linear function of all outputs that depend on the parameters."""
    terms = []
    for index, output in enumerate(outputs):
        if not output.requires_grad or not output.numel():
            continue
        values = _real(output)
        generator = torch.Generator().manual_seed(_SEED + index)
        direction = torch.randn(values.shape, generator=generator, dtype=torch.float64)
        dtype = arithmetic_dtype(values.dtype)
        direction = direction.to(values.device, dtype) / math.sqrt(values.numel())
        terms.append((values.to(dtype) * direction).sum().double())
    return torch.stack(terms).sum() if terms else None


def named_tensors(
    value: Any, name: str = "", seen: frozenset[int] = frozenset()
) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a model's output, with names: mappings, sequences, and objects like caches."""
    if isinstance(value, Tensor):
        yield name or "output", value
        return
    if id(value) in seen or isinstance(value, nn.Module | type):
        return
    if isinstance(value, Mapping):
        children = list(value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        children = list(zip(value._fields, value, strict=True))
    elif isinstance(value, tuple | list):
        children = list(enumerate(value))
    else:
        children = list(getattr(value, "__dict__", {}).items())
    for key, child in children:
        yield from named_tensors(child, f"{name}.{key}" if name else str(key), seen | {id(value)})


def compare(expected: Run, actual: Run, dtype: torch.dtype, allowed: float) -> list[Comparison]:
    """Every output of either run, and the gradient of every parameter of the expected one.

    A parameter that no output depends on has the gradient zero.
    """
    name = str(dtype).removeprefix("torch.")
    comparisons = []
    for output in dict.fromkeys([*expected.outputs, *actual.outputs]):
        error, largest = _difference(expected.outputs.get(output), actual.outputs.get(output))
        relative = _ratio(error, largest)
        comparisons.append(Comparison(name, "output", output, error, relative, allowed))
    magnitudes = [_largest(grad) for grad in expected.gradients.values() if grad is not None]
    floor = gradient_floor(dtype) * max(magnitudes, default=0.0)
    for parameter, grad in expected.gradients.items():
        other = actual.gradients.get(parameter)
        if grad is None and other is None:
            continue
        error, largest = _difference(_or_zero(grad, other), _or_zero(other, grad))
        relative = _ratio(error, max(largest, floor))
        comparisons.append(Comparison(name, "gradient", parameter, error, relative, allowed))
    return comparisons


def gradient_floor(dtype: torch.dtype) -> float:
    """The part of the model's largest gradient that errors of gradients are relative to, at least.

    Some gradients are zero in exact arithmetic, like that of a key's bias, and consist of rounding
    errors of much larger terms: 1e-3, or ``sqrt(eps)`` where that is larger.
    """
    return max(1e-3, math.sqrt(torch.finfo(dtype).eps))


def _or_zero(tensor: Tensor | None, like: Tensor | None) -> Tensor | None:
    if tensor is None and like is not None:
        return torch.zeros_like(like)
    return tensor


def _difference(expected: Tensor | None, actual: Tensor | None) -> tuple[float, float]:
    """The largest difference and the largest finite magnitude expected."""
    if expected is None or actual is None:
        return math.inf, 0.0
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return math.inf, 0.0
    if not expected.numel():
        return 0.0, 0.0
    wanted, found = _real(expected).cpu().double(), _real(actual).cpu().double()
    # infinities, as in masks, are equal or infinitely far apart
    gaps = torch.where(wanted == found, 0.0, (wanted - found).abs())
    return float(gaps.max()), _largest(expected)


def _largest(tensor: Tensor) -> float:
    magnitudes = _real(tensor).cpu().double().abs()
    finite = magnitudes[magnitudes.isfinite()]
    return float(finite.max()) if finite.numel() else 0.0


def _ratio(error: float, largest: float) -> float:
    if error == 0 or math.isnan(error):
        return error
    return error / largest if largest else math.inf


def _cloned(tree: Any) -> Any:
    """Copies of inputs: a call may write into a cache that it is given."""
    return pytree.tree_map(
        lambda leaf: (
            leaf.detach().clone().requires_grad_(leaf.requires_grad)
            if isinstance(leaf, Tensor)
            else copy.deepcopy(leaf)
        ),
        tree,
    )


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _dense(grad: Tensor) -> Tensor:
    return grad.to_dense() if grad.is_sparse else grad
