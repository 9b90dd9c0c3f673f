"""Graphs that are handed in: plan, convert and strip take them as they are, or say why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import attnres_compile
from attnres_compile import AttnResConfig
from attnres_compile.errors import AlreadyConvertedError, ConfigError, InputError

X = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.linears:
            x = x + linear(x)
        return x


def graph_module() -> Any:
    return fx.symbolic_trace(Flat())


def program() -> Any:
    return torch.export.export(Flat(), (X,))


KINDS = pytest.mark.parametrize("make", [graph_module, program])


@KINDS
def test_a_plan_is_what_converting_does(make: Any) -> None:
    graph = make()
    nodes = len(graph.graph.nodes)
    config = AttnResConfig(num_blocks=2, aggregate="mean")
    plan = attnres_compile.plan(graph, (X,), config=config)
    assert plan.num_residual_additions == 4
    assert len(plan.streams[0].blocks) == 2
    assert len(graph.graph.nodes) == nodes
    converted = attnres_compile.convert(graph, (X,), plan=plan)
    assert converted.plan == plan
    assert attnres_compile.convert(graph, (X,)).plan != plan


@KINDS
def test_no_executor(make: Any) -> None:
    with pytest.raises(ConfigError, match=r"executor='attnres' is for other models"):
        attnres_compile.convert(make(), (X,), executor="attnres")


@KINDS
def test_not_twice_and_not_back(make: Any) -> None:
    graph = make()
    with pytest.raises(InputError, match="was not converted"):
        attnres_compile.strip(graph)
    converted = attnres_compile.convert(graph, (X,))
    for again in (attnres_compile.convert, attnres_compile.plan):
        with pytest.raises(AlreadyConvertedError, match="this graph was converted already"):
            again(converted, (X,))
    with pytest.raises(InputError, match="cannot be stripped, since its additions are gone"):
        attnres_compile.strip(converted)
