"""Models whose streams are converted with delta sources, and what a person reads in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision
import transformers
from torch import Tensor, nn

import oracle_deltas
from attnres_compile import AttnResConfig
from zoo_case import perturb, tokens

WIDTH = 16
TOLERANCE = 1e-10


def small(config: Any, **options: Any) -> Any:
    sizes = {
        "vocab_size": 96,
        "hidden_size": WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 2 * WIDTH,
    }
    return config(**sizes, **options)


def make_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, batch_first=True)
    return nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(WIDTH))


def make_resnet(blocks: tuple[int, ...] = (4, 1, 3, 2)) -> nn.Module:
    """The stages have 3, 0, 2 and 1 blocks after the one that projects its skip."""
    bottleneck = torchvision.models.resnet.Bottleneck
    return torchvision.models.ResNet(bottleneck, list(blocks), num_classes=5, width_per_group=4)


@dataclass(frozen=True)
class Case:
    """A model and what is counted by hand in its source.

    Attributes:
        sublayers: of each stream, by its name.
        too_short: additions in streams of one sublayer, which are refused.
        oracle: its forward pass with delta sources; None for the plan alone.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    sublayers: dict[str, int]
    oracle: Callable[..., dict[str, Tensor]] | None
    too_short: int = 0

    def build(self) -> tuple[nn.Module, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = self.make().eval()
            perturb(model)
            inputs = self.inputs()
        return model.double(), inputs.double() if inputs.is_floating_point() else inputs

    def __str__(self) -> str:
        return self.name


def values() -> Tensor:
    return torch.randn(2, 5, WIDTH)


def pixels() -> Tensor:
    return torch.randn(2, 3, 32, 32)


SHARED = "encoder.albert_layer_groups.0.albert_layers.0"
CASES = [
    Case(
        "bert",
        lambda: transformers.BertModel(small(transformers.BertConfig)),
        tokens,
        {"encoder.layer": 6},
        oracle_deltas.bert,
    ),
    Case(
        "albert",
        lambda: transformers.AlbertModel(small(transformers.AlbertConfig, embedding_size=8)),
        tokens,
        {SHARED: 6},
        oracle_deltas.albert,
    ),
    Case("encoder", make_encoder, values, {"layers": 6}, oracle_deltas.transformer_encoder),
    Case(
        "resnet",
        make_resnet,
        pixels,
        {"layer1": 3, "layer3": 2},
        oracle_deltas.resnet,
        too_short=1,
    ),
    Case(
        "deep_norm",
        lambda: oracle_deltas.DeepNorm(WIDTH, 5),
        values,
        {"stream": 5},
        oracle_deltas.deep_norm,
    ),
    Case(
        "gated_skips",
        lambda: oracle_deltas.GatedSkips(WIDTH, 5),
        values,
        {"stream": 5},
        oracle_deltas.gated_skips,
    ),
    Case(
        "subtracted",
        lambda: oracle_deltas.Subtracted(WIDTH, 5),
        values,
        {"stream": 5},
        oracle_deltas.subtracted,
    ),
    Case(
        "lambdas",
        lambda: oracle_deltas.Lambdas(WIDTH, 3),
        values,
        {"stream": 6},
        oracle_deltas.lambdas,
    ),
]
PLANNED_ONLY: list[Any] = [
    Case(
        "roberta",
        lambda: transformers.RobertaModel(small(transformers.RobertaConfig)),
        tokens,
        {"encoder.layer": 6},
        None,
    ),
    Case(
        "transformer",
        lambda: nn.Transformer(WIDTH, 2, 2, 2, 2 * WIDTH, batch_first=True),
        values,
        {"encoder.layers": 4, "decoder.layers": 6},
        None,
    ),
    pytest.param(
        Case(
            "resnet50",
            torchvision.models.resnet50,
            pixels,
            {"layer1": 2, "layer2": 3, "layer3": 5, "layer4": 2},
            None,
        ),
        marks=pytest.mark.slow,
    ),
]


def with_slow(cases: list[Any], names: set[str]) -> list[Any]:
    """Cases by name behind the slow marker; the forward passes by hand take them all anyway."""
    return [pytest.param(c, marks=pytest.mark.slow) if str(c) in names else c for c in cases]


PLANS_ALIKE = {"resnet", "roberta", "transformer"}
CONFIG = AttnResConfig(block_sublayers=2, delta_sources=True)


def arguments(case: Case, inputs: Tensor) -> tuple[Any, ...]:
    return (inputs, inputs) if case.name == "transformer" else (inputs,)


def assert_same_gradient(actual: Tensor | None, expected: Tensor | None, name: str) -> None:
    assert actual is not None, name
    assert expected is not None, name
    scale = max(expected.abs().max().item(), 1e-3)
    assert (actual - expected).abs().max().item() <= 100 * TOLERANCE * scale, name
