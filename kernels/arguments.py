"""What every launch needs: the layout of rows, and arguments by the names of parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from attnres_compile.kernels import launch
from attnres_compile.kernels.codegen import Specialisation
from attnres_compile.kernels.implementations import tokens_of
from attnres_compile.kernels.launch import Argument
from attnres_compile.kernels.reference import arithmetic_dtype


@dataclass(frozen=True)
class Layout:
    """How the rows of a source lie in memory."""

    like: Tensor
    dim: int

    @property
    def width(self) -> int:
        return self.like.shape[self.dim]

    @property
    def tokens(self) -> int:
        return math.prod(tokens_of(self.like, self.dim))

    @property
    def inner(self) -> int:
        """The distance between two channels of a token."""
        return math.prod(self.like.shape[self.dim % self.like.ndim + 1 :])

    @property
    def images(self) -> bool:
        return self.inner != 1

    def sizes(self) -> dict[str, Argument]:
        inner: dict[str, Argument] = {"inner": self.inner} if self.images else {}
        return {"tokens": self.tokens, **inner}

    def source(self, dtype: torch.dtype | None = None) -> Tensor:
        return launch.allocate(self.like, *self.like.shape, dtype=dtype)

    def statistics(self, *rows: int) -> Tensor:
        dtype = arithmetic_dtype(self.like.dtype)
        return launch.allocate(self.like, *rows, *tokens_of(self.like, self.dim), dtype=dtype)

    def chunks(self, specialisation: Specialisation) -> int:
        return -(-self.tokens // launch.block(specialisation, self.like, self.tokens))


def groups(count: int, most: int) -> list[range]:
    """``range(count)`` in as few parts of at most ``most`` as there can be, of about one size."""
    parts = -(-count // most)
    bounds = [part * count // parts for part in range(parts + 1)] if parts else []
    return [range(*pair) for pair in pairwise(bounds)]


def named(name: str, tensors: Sequence[Tensor]) -> dict[str, Argument]:
    return {f"{name}{i}": tensor for i, tensor in enumerate(tensors)}


def accepted(kernel: Specialisation, given: dict[str, Argument | None]) -> dict[str, Argument]:
    """Of what is given, what the kernel has a parameter for."""
    accepted = {}
    for parameter in kernel.parameters:
        value = given[parameter.name]
        assert value is not None, parameter.name
        accepted[parameter.name] = value
    return accepted


def contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]
