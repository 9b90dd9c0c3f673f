"""Converted models with random queries, for tests of what happens to them afterwards.

At zero queries a converted model computes what the original does, so that a path on which the
Attention Residuals are silently missing would not show. Random queries make every output differ.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import attnres_compile
from attnres_compile import AttnResConfig
from oracle_cases import CASES, VOCABULARY, WIDTH, OracleCase, run_oracle
from oracle_mixer import BlockMixer, Mixing, OracleStream, SiteKey, SiteParameters
from tolerances import relative_error
from zoo_case import perturb


def make_llama() -> nn.Module:
    """Two layers, four sublayers: compiling it takes seconds."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


LLAMA: OracleCase = dataclasses.replace(CASES[0], make_model=make_llama)
NUM_BLOCKS = 2  # of two sublayers, so that sites with and without a partial sum occur


def randomize(converted: nn.Module, seed: int = 3) -> None:
    """Queries with scores of order one, and gains around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in converted.named_parameters():
            if ".attnres." not in f".{name}":
                continue
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if name.endswith(".query"):
                parameter.copy_(noise * parameter.numel() ** -0.5)
            else:
                parameter.copy_(1 + 0.3 * noise)


def convert_randomized(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: Any = None, **options: Any
) -> Any:
    """A converted copy of a model, with random queries."""
    converted = attnres_compile.convert(copy.deepcopy(model), args, kwargs, **options)
    randomize(converted)
    return converted


def converted_llama(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A Llama in two blocks, with random queries."""
    config = AttnResConfig(num_blocks=NUM_BLOCKS)
    return convert_randomized(LLAMA.build(dtype), (), llama_inputs(dtype), config=config, **options)


def llama_inputs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return LLAMA.arguments(dtype)[1]


def sites_of(converted: Any) -> dict[SiteKey, SiteParameters]:
    """The numbers that a converted model has at its sites, in the form that oracles take."""
    parameters = dict(converted.named_parameters())
    sites = {}
    for stream in converted.plan.streams:
        for site in stream.sites:
            if site.query_name is not None:
                query, gain = parameters[site.query_name], parameters[site.gain_name]
                sites[stream.name, site.depth] = SiteParameters(
                    query.detach().clone(), gain.detach().clone()
                )
    return sites


def llama_oracle_logits(converted: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the hand-written Block AttnRes Llama computes with a converted Llama's weights."""
    plain = LLAMA.build(dtype)
    names = dict(plain.named_parameters())
    plain.load_state_dict({name: converted.state_dict()[name] for name in names})
    result = run_oracle(LLAMA, plain, Mixing(sites_of(converted), num_blocks=NUM_BLOCKS), dtype)
    return result.outputs["logits"].detach()


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return relative_error(actual, expected)


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.5)
        self.breaks_graph = False

    def forward(self, x: Tensor) -> Tensor:
        if self.breaks_graph:
            torch._dynamo.graph_break()
        return x + self.dropout(self.linear(self.norm(x)))


class Tower(nn.Module):
    """The smallest model with a residual stream, and other ways through its layers than forward."""

    def __init__(self, width: int = 8, layers: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(5, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3)
        self.checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointing else layer(x)
        return self.head(self.norm(x))

    def features(self, x: Tensor) -> Tensor:
        """The same layers, without the head."""
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def first_features(self, x: Tensor) -> Tensor:
        """Only some of the layers."""
        x = self.stem(x)
        for layer in self.layers[:2]:
            x = layer(x)
        return self.norm(x)

    def stem_and_head(self, x: Tensor) -> Tensor:
        """No layer at all."""
        return self.head(self.stem(x))


def tower_inputs(batch: int = 6, seed: int = 5) -> Tensor:
    return torch.randn(batch, 5, generator=torch.Generator().manual_seed(seed))


def tower() -> Tower:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = Tower().eval()
        perturb(model)
    return model


def converted_tower(**options: Any) -> Any:
    """A tower in two blocks, with random queries."""
    config = AttnResConfig(num_blocks=NUM_BLOCKS)
    return convert_randomized(tower(), (tower_inputs(),), config=config, **options)


def tower_oracle(
    converted: Any, x: Tensor, num_blocks: int | Literal["auto"] = NUM_BLOCKS
) -> Tensor:
    """The formula, for the weights and queries of a converted tower."""
    width = converted.stem.out_features
    stream = OracleStream("layers", width, len(converted.layers), 1)
    mixer = BlockMixer(stream, converted.stem(x), Mixing(sites_of(converted), num_blocks), {})
    for layer in converted.layers:
        mixer.add(layer.linear(layer.norm(mixer.read())))
    return converted.head(converted.norm(mixer.read()))
