"""The analysis grows no worse than linearly with depth, whichever way the additions are written."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from attnres_compile.passes.classify_readers import channel_dimension, classify_readers
from attnres_compile.passes.dataflow import Dataflow
from attnres_compile.passes.find_existing import find_existing
from attnres_compile.passes.find_streams import find_streams
from passes_helpers import WIDTH, tokens, trace

SHALLOW, TIMES = 12, 4


class Layer(nn.Module):
    """A Llama layer in small: norms in steps, rotary embeddings, gates."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.gate, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.gain = nn.Parameter(torch.ones(WIDTH))
        self.in_place = in_place

    def norm(self, x: Tensor) -> Tensor:
        return self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def rotated(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return x * self.gain + torch.cat((-right, left), -1) * self.gain

    def add(self, x: Tensor, branch: Tensor) -> Tensor:
        return x.add_(branch) if self.in_place else x + branch

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        heads = self.rotated(self.q(n)), self.rotated(self.k(n)), self.v(n)
        x = self.add(x, self.o(F.scaled_dot_product_attention(*heads)))
        n = self.norm(x)
        return self.add(x, self.down(F.silu(self.gate(n)) * self.up(n)))


class Network(nn.Module):
    def __init__(self, layers: int, *, in_place: bool = False, nested: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Layer(in_place=in_place) for _ in range(layers))
        self.nested = nested

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for number, layer in enumerate(self.layers):
            outer = self.nested and number % 2 == 1
            x = x + self.stem(layer(layer(x))) if outer else layer(x)
        return x


def analyse(graph: fx.Graph) -> int:
    """Everything that planning asks of a graph; returns how many residual additions there are."""
    assert not find_existing(Dataflow.of(graph))
    streams = find_streams(graph).streams
    for stream in streams:
        assert channel_dimension(stream) == -1
        for site in stream.sites:
            classify_readers(site)
    return sum(len(stream.additions) for stream in streams)


def calls(graph: fx.Graph) -> int:
    profile = cProfile.Profile()
    profile.runcall(analyse, graph)
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "make",
    [
        Network,
        lambda layers: Network(layers, in_place=True),
        lambda layers: Network(layers, nested=True),
    ],
    ids=["out of place", "in place", "nested"],
)
def test_four_times_the_depth_takes_four_times_as_long(make: Callable[[int], nn.Module]) -> None:
    shallow, deep = (trace(make(layers), tokens()).graph for layers in (SHALLOW, TIMES * SHALLOW))
    assert analyse(deep) == TIMES * analyse(shallow)
    # Calls are counted, not seconds; a quadratic loop would make sixteen times as many.
    assert calls(deep) < 1.1 * TIMES * calls(shallow)
