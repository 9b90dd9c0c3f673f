"""An addition is called the same in every capture of a model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnres_compile.capture import Captured, capture
from attnres_compile.passes.find_streams import find_streams
from attnres_compile.passes.identify_additions import Identity, identify_additions


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.first(self.norm(x)))
        return x + self.second(self.norm(x))


class Model(nn.Module):
    """Two layers, then an addition of the model's own."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x + self.last(x)


def identities(captured: Captured) -> list[Identity]:
    return list(identify_additions(find_streams(captured.module.graph).streams).values())


EXPECTED = [
    ("layers.0", 0),
    ("layers.0", 1),
    ("layers.1", 0),
    ("layers.1", 1),
    ("", 0),
]


@pytest.mark.parametrize("route", ["dynamo", "export"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identities_are_the_same_in_every_capture(
    route: str, training: bool, dtype: torch.dtype
) -> None:
    model = Model(Block(), Block()).train(training).to(dtype)
    captured = capture(model, (torch.randn(2, 3, 8, dtype=dtype),), route=route)  # type: ignore[arg-type]
    assert identities(captured) == EXPECTED


def test_calls_of_one_module_are_counted_on() -> None:
    shared = Block()
    captured = capture(Model(shared, shared), (torch.randn(2, 3, 8),))
    assert identities(captured)[:4] == [("layers.0", i) for i in range(4)]


def test_ordinals_count_additions_in_graph_order_over_all_streams() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(8, 8)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            for _ in range(2):
                x = x + self.f(x)
                y = y + self.f(y)
            return x, y

    captured = capture(Two(), (torch.randn(2, 8), torch.randn(2, 8)))
    streams = find_streams(captured.module.graph).streams
    found = identify_additions(streams)
    per_stream = [[found[a.node] for a in stream.additions] for stream in streams]
    assert per_stream == [[("", 0), ("", 2)], [("", 1), ("", 3)]]
    # A stream alone counts only itself.
    assert list(identify_additions(streams[1:]).values()) == [("", 0), ("", 1)]
