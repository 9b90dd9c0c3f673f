"""What the operators share: who computes them, in which modes, and what they do not do."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor

from attnres_compile.errors import BackendError

# The norms, and how many statistics of a token each keeps for its backward pass.
NORM_ROWS = {"none": 0, "rms": 1, "layer": 2}
_MODULES = {"reference": "plain_phases", "triton": "triton_phases", "cpp": "cpp_phases"}


def implementation(kernels: str) -> ModuleType:
    """The module that computes a phase: plain PyTorch, generated Triton kernels or C++."""
    if kernels not in _MODULES:
        raise BackendError(f"kernels={kernels!r} is unknown; use one of {tuple(_MODULES)}.")
    return import_module(f"attnres_compile.kernels.{_MODULES[kernels]}")


def tokens_of(source: Tensor, dim: int) -> list[int]:
    """The shape of ``source`` without its channel dimension."""
    tokens = list(source.shape)
    del tokens[dim]
    return tokens


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Inside an operator autocast still rewrites calls, such as the matrix products here."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def differentiate_once(operator: Any) -> None:
    """Make differentiating a backward operator an error that says what to do."""

    def refuse(*_: object) -> NoReturn:
        raise NotImplementedError(
            f"{operator._qualname} has no derivative; for second derivatives call "
            "attnres_compile.kernels.reference.mix."
        )

    operator.register_autograd(refuse)
