"""A hand-written model with Attention Residuals of which one block is measured.

The sublayers are operators that the compiler cannot look into, as matrix products are; they do
next to nothing and tell `listeners` when they run, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnres_compile.functional import attnres

EPS = 1e-6
Mixer = Callable[[Sequence[Tensor], Tensor], Tensor]
# called with the number of a sublayer, and with whether its backward pass runs
listeners: list[Callable[[int, bool], None]] = []


def _tell(number: int, backward: bool) -> None:
    for listener in listeners:
        listener(number, backward)


@torch.library.custom_op("attnres_bench::sublayer", mutates_args=())
def sublayer(x: Tensor, number: int) -> Tensor:
    """Stands for an attention or an MLP: opaque to the compiler."""
    _tell(number, False)
    return x * 0.5


@torch.library.custom_op("attnres_bench::sublayer_backward", mutates_args=())
def sublayer_backward(gradient: Tensor, number: int) -> Tensor:
    _tell(number, True)
    return gradient * 0.5


@sublayer.register_fake
def _(x: Tensor, number: int) -> Tensor:
    return torch.empty_like(x)


@sublayer_backward.register_fake
def _(gradient: Tensor, number: int) -> Tensor:
    return torch.empty_like(gradient)


def _setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.number = inputs[1]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return torch.ops.attnres_bench.sublayer_backward(gradient, ctx.number), None


sublayer.register_autograd(_backward, setup_context=_setup_context)


class ResidualModel(nn.Module):
    """Blocks of sublayers; before each sublayer a mix of the completed sources, and a norm.

    Args:
        blocks: the number of sublayers of each block.
        width: channels.
        mixer: mixes sources by a query.
        norm: "rms" or "layer", what reads a mix.
    """

    def __init__(
        self, blocks: Sequence[int], width: int, mixer: Mixer | None = None, norm: str = "rms"
    ) -> None:
        super().__init__()
        sites = sum(blocks) + 1
        kind = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}[norm]
        self.blocks = tuple(blocks)
        self.mixer = mixer or attnres_mix
        self.queries = nn.ParameterList(0.1 * torch.randn(width) for _ in range(sites))
        self.norms = nn.ModuleList(kind(width, eps=EPS) for _ in range(sites))

    def forward(self, root: Tensor) -> Tensor:
        completed = [root]
        number = 0
        for size in self.blocks:
            partial: list[Tensor] = []
            for _ in range(size):
                branch = sublayer(self._read([*completed, *partial], number), number)
                partial = [partial[0] + branch] if partial else [branch]
                number += 1
            completed += partial
        return self._read(completed, number)

    def _read(self, sources: list[Tensor], number: int) -> Tensor:
        single = len(sources) == 1  # nothing to choose from
        mixed = sources[0] if single else self.mixer(sources, self.queries[number])
        normed: Tensor = self.norms[number](mixed)
        return normed


def attnres_mix(sources: Sequence[Tensor], query: Tensor) -> Tensor:
    """The operator that the backend knows."""
    return attnres(sources, query, eps=EPS)


def stacked_mix(sources: Sequence[Tensor], query: Tensor) -> Tensor:
    """The naive form: stack, norm, and two sums; Inductor is free to fuse it."""
    values = torch.stack(tuple(sources)).float()
    keys = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + EPS)
    weights = (keys * query.float()).sum(-1).softmax(0)
    return (weights.unsqueeze(-1) * values).sum(0).to(sources[0].dtype)
