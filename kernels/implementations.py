"""What the operators of the phases share: who computes them, and what they do not do."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NoReturn

from torch import Tensor

from attnres_compile.errors import BackendError
from attnres_compile.kernels.ops import _without_autocast as without_autocast

__all__ = ["differentiate_once", "implementation", "tokens_of", "without_autocast"]


def implementation(kernels: str) -> ModuleType:
    """The module that computes the phases: plain PyTorch, C++ or generated Triton kernels."""
    if kernels == "reference":
        from attnres_compile.kernels import plain_phases

        return plain_phases
    if kernels == "cpp":
        from attnres_compile.kernels import cpp_phases

        return cpp_phases
    if kernels == "triton":
        from attnres_compile.kernels import triton_phases

        return triton_phases
    raise BackendError(f"kernels={kernels!r} is unknown; use 'reference', 'cpp' or 'triton'.")


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
