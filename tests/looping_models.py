"""What models that loop over their layers are made of, and a model with its input."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, LAYERS = 8, 3
TOLERANCE = 1e-10


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,))


def attention(x: Tensor, weight: Tensor) -> Tensor:
    y = norm(x) @ weight
    return torch.softmax(y @ y.transpose(1, 2), -1) @ y


def feed_forward(x: Tensor, weight: Tensor) -> Tensor:
    return torch.tanh(norm(x) @ weight)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.first = nn.Parameter(torch.randn(LAYERS, WIDTH, WIDTH) / 2)
        self.second = nn.Parameter(torch.randn(LAYERS, WIDTH, WIDTH) / 2)
        self.head = nn.Linear(WIDTH, 3)

    def weights(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.first[layer], self.second[layer]


def build(make: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return make().double(), torch.randn(2, 4, WIDTH).double()
