"""The network that is timed on a CPU: plain, converted, and written by hand in the naive form."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnres_compile.bench.residual_model import stacked_mix
from attnres_compile.config import AttnResConfig
from attnres_compile.conversion import convert

VOCABULARY = 512


@dataclass(frozen=True)
class Shape:
    layers: int
    width: int
    heads: int
    batch: int
    tokens: int
    blocks: int


SHAPES = {
    "a": Shape(layers=12, width=512, heads=8, batch=4, tokens=256, blocks=4),
    "b": Shape(layers=24, width=128, heads=4, batch=8, tokens=256, blocks=8),
    "tiny": Shape(layers=2, width=32, heads=2, batch=2, tokens=16, blocks=2),
}


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return result


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(shape)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class Decoder(nn.Module):
    """A plain pre-norm transformer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class NaiveDecoder(nn.Module):
    """The same network with the same sites as its conversion, each a stack of all its sources."""

    def __init__(self, plain: Decoder, blocks: int) -> None:
        super().__init__()
        self.plain = plain
        self.sublayers = 2 * len(plain.layers)
        self.size = self.sublayers // blocks
        width = plain.norm.weight.numel()
        self.queries = nn.ParameterList(
            nn.Parameter(torch.zeros(width)) for _ in range(self.sublayers)
        )

    def forward(self, ids: Tensor) -> Tensor:
        completed = [self.plain.embedding(ids)]
        partial: list[Tensor] = []
        for number in range(self.sublayers):
            layer: Any = self.plain.layers[number // 2]
            norm, body = (layer.norm2, layer.mlp) if number % 2 else (layer.norm1, layer.attention)
            branch = body(norm(self._read([*completed, *partial], number)))
            partial = [partial[0] + branch] if partial else [branch]
            if (number + 1) % self.size == 0:
                completed, partial = [*completed, *partial], []
        last = self._read([*completed, *partial], self.sublayers)
        logits: Tensor = self.plain.head(self.plain.norm(last))
        return logits

    def _read(self, sources: Sequence[Tensor], number: int) -> Tensor:
        if len(sources) == 1:
            return sources[0]
        return len(sources) * stacked_mix(sources, self.queries[number - 1])


def models(shape: Shape) -> tuple[dict[str, Any], Tensor]:
    """The plain, the converted and the naive network, which all compute the same, and an input."""
    torch.manual_seed(0)
    plain = Decoder(shape)
    ids = torch.randint(0, VOCABULARY, (shape.batch, shape.tokens))
    converted = convert(plain, (ids,), config=AttnResConfig(num_blocks=shape.blocks))
    naive = NaiveDecoder(copy.deepcopy(plain), shape.blocks)
    return {"plain": plain, "converted": converted, "naive": naive}, ids
