"""What the operators of the phases share: who computes them, and what they do not do."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn

from torch import Tensor

from attnres_compile.errors import BackendError
from attnres_compile.kernels.ops import _without_autocast as without_autocast

__all__ = ["differentiate_once", "implementation", "tokens_of", "without_autocast"]

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


def differentiate_once(operator: Any) -> None:
    """Make differentiating a backward operator an error that says what to do."""

    def refuse(*_: object) -> NoReturn:
        raise NotImplementedError(
            f"{operator._qualname} has no derivative; for second derivatives call "
            "attnres_compile.kernels.reference.mix."
        )

    operator.register_autograd(refuse)
