"""The modules that a site is about, written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnres_compile.capture import capture
from attnres_compile.passes.dataflow import Dataflow
from attnres_compile.passes.find_streams import find_streams
from attnres_compile.passes.locate_sites import locate_sites


class Layer(nn.Module):
    def __init__(self, *, parallel: bool) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(4), nn.LayerNorm(4)
        self.attn, self.mlp = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.parallel = parallel

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        if self.parallel:
            return x + self.attn(self.norm_1(x)) * scale + self.mlp(self.norm_2(x))
        x = x + self.attn(self.norm_1(x)) * scale
        return x + self.mlp(self.norm_2(x))


class Model(nn.Module):
    def __init__(self, *, parallel: bool) -> None:
        super().__init__()
        self.scaling = nn.Linear(4, 4)  # depends on no state
        self.layers = nn.ModuleList(Layer(parallel=parallel) for _ in range(2))
        self.probe = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.scaling(torch.ones_like(x))
        x = self.layers[0](x, scale)
        probed = self.probe(x)
        x = self.layers[1](x, scale)
        return self.norm(x), probed


SEQUENTIAL = [
    {"layers.0.norm_1", "layers.0.attn", "layers.0"},
    {"layers.0.norm_2", "layers.0.mlp.0", "layers.0.mlp.1"},
    {"layers.1.norm_1", "layers.1.attn", "layers.1", "probe"},
    {"layers.1.norm_2", "layers.1.mlp.0", "layers.1.mlp.1"},
    {"norm"},
]
PARALLEL = [
    SEQUENTIAL[0] | SEQUENTIAL[1],
    SEQUENTIAL[2] | SEQUENTIAL[3],
    {"norm"},
]


@pytest.mark.parametrize(("parallel", "expected"), [(False, SEQUENTIAL), (True, PARALLEL)])
def test_what_a_site_is_about(parallel: bool, expected: list[set[str]]) -> None:
    graph = capture(Model(parallel=parallel), (torch.randn(3, 4),)).module.graph
    (stream,) = find_streams(graph).streams
    located = locate_sites(Dataflow.of(graph), stream)
    assert [set(paths) for paths in located.values()] == expected
    assert list(located) == [i for i, state in enumerate(stream.states) if state.reads]
