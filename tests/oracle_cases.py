"""The five models of the oracles, tiny, with inputs and with everything a comparison needs.

They are deep enough for 8 blocks and no wider than they must be. Layers are chosen so that the
layouts differ: remainders, boundaries between layers and inside them, clipped and refused streams.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import oracles
from handwritten_models import PreActivationResNet
from oracle_mixer import Mixing, OracleResult, OracleStream, SiteKey, SiteParameters
from tolerances import relative_error
from zoo_case import perturb, tokens

VOCABULARY = 48
WIDTH = 32


@dataclass(frozen=True, kw_only=True)
class OracleCase:
    """A model, its inputs, its oracle, and which module reads each site in the plain model."""

    name: str
    make_model: Callable[[], nn.Module]
    make_inputs: Callable[[], dict[str, Tensor]]
    streams: Callable[[Any], list[OracleStream]]
    oracle: Callable[..., OracleResult]
    readers: Callable[[], dict[SiteKey, str]]
    is_language_model: bool = True

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The model in eval mode, the same weights every time and in every dtype."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model = self.make_model().float().eval()
            perturb(model)
        return model.to(dtype)

    def inputs(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(8)
            inputs = self.make_inputs()
        return {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in inputs.items()
        }

    def arguments(
        self, dtype: torch.dtype = torch.float64
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same inputs as the model itself takes them."""
        inputs = self.inputs(dtype)
        if self.is_language_model:
            return (), {**inputs, "use_cache": False}
        return tuple(inputs.values()), {}

    def run(self, model: nn.Module, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """The model's own outputs, by the names that the oracle gives them."""
        args, kwargs = self.arguments(dtype)
        output = model(*args, **kwargs)
        if not self.is_language_model:
            return {"logits": output}
        names = ("logits", "encoder_last_hidden_state")
        return {name: output[name] for name in names if name in output}

    def __str__(self) -> str:
        return self.name


def random_sites(
    streams: list[OracleStream],
    kind: Literal["random", "zero"] = "random",
    dtype: torch.dtype = torch.float64,
    *,
    key_gain: bool = True,
) -> dict[SiteKey, SiteParameters]:
    """Parameters for every site but the root's, drawn in float32 so that all dtypes agree.

    Keys have a mean square of about one, so queries of this scale give scores of order one: the
    weights are far from uniform, and the softmax far from saturated.
    """
    generator = torch.Generator().manual_seed(9)
    sites = {}
    for stream in streams:
        for depth in range(1, stream.sublayers + 1):
            query = torch.randn(stream.channels, generator=generator) * stream.channels**-0.5
            gain = 1 + 0.3 * torch.randn(stream.channels, generator=generator)
            if kind == "zero":
                query, gain = torch.zeros_like(query), torch.ones_like(gain)
            if not key_gain:
                gain = torch.ones_like(gain)
            sites[stream.name, depth] = SiteParameters(
                query.to(dtype).requires_grad_(), gain.to(dtype).requires_grad_()
            )
    return sites


def loss_of(outputs: dict[str, Tensor]) -> Tensor:
    """A scalar that every output element enters with a weight of its own."""
    generator = torch.Generator().manual_seed(10)
    terms = [
        (outputs[name] * torch.randn(outputs[name].shape, generator=generator)).mean()
        for name in sorted(outputs)
    ]
    return torch.stack(terms).sum()


def gradient_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def output_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest magnitude expected."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    return relative_error(actual, expected)


def run_oracle(
    case: OracleCase, model: nn.Module, mixing: Mixing, dtype: torch.dtype = torch.float64
) -> OracleResult:
    return case.oracle(model, mixing, **case.inputs(dtype))


def make_llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=5,  # 10 sublayers: 3 blocks are 1, 1, 3 layers; 8 blocks 1, ..., 1, 3
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def make_gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=6,  # 12 sublayers: 3 blocks of two layers; 8 blocks are 1, ..., 1, 5 sublayers
        n_head=4,
        n_positions=32,
        # the defaults of GPT2Config lie outside this vocabulary
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config)


def make_gpt_neox() -> nn.Module:
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=9,  # 9 sublayers: 8 blocks are 1, ..., 1, 2 layers
        num_attention_heads=4,
        max_position_embeddings=32,
        use_parallel_residual=True,
    )
    return GPTNeoXForCausalLM(config)


def make_t5() -> nn.Module:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=8,
        d_ff=2 * WIDTH,
        num_layers=4,  # encoder: 8 sublayers
        num_decoder_layers=3,  # decoder: 9 sublayers, 8 blocks are 1, ..., 1, 2 sublayers
        num_heads=4,
    )
    return T5ForConditionalGeneration(config)


def make_preact_resnet() -> nn.Module:
    """Stages of 9, 3 and 1 identity blocks: a deep stream, a clipped one and a refused one."""
    model = PreActivationResNet(widths=(8, 12, 16), blocks=9)
    del model.stages[1][4:]
    del model.stages[2][2:]
    return model


def make_padded_tokens() -> dict[str, Tensor]:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": tokens(2, 7, VOCABULARY), "attention_mask": mask}


def llama_readers() -> dict[SiteKey, str]:
    readers = {("model.layers", 10): "model.norm"}
    for layer in range(5):
        path = f"model.layers.{layer}"
        readers["model.layers", 2 * layer] = f"{path}.input_layernorm"
        readers["model.layers", 2 * layer + 1] = f"{path}.post_attention_layernorm"
    return readers


def gpt2_readers() -> dict[SiteKey, str]:
    readers = {("transformer.h", 12): "transformer.ln_f"}
    for layer in range(6):
        readers["transformer.h", 2 * layer] = f"transformer.h.{layer}.ln_1"
        readers["transformer.h", 2 * layer + 1] = f"transformer.h.{layer}.ln_2"
    return readers


def gpt_neox_readers() -> dict[SiteKey, str]:
    name = "gpt_neox.layers"
    readers = {(name, layer): f"{name}.{layer}.input_layernorm" for layer in range(9)}
    return {**readers, (name, 9): "gpt_neox.final_layer_norm"}


def t5_readers() -> dict[SiteKey, str]:
    readers = {
        ("encoder.block", 8): "encoder.final_layer_norm",
        ("decoder.block", 9): "decoder.final_layer_norm",
    }
    for name, layers, per_layer in (("encoder.block", 4, 2), ("decoder.block", 3, 3)):
        for depth in range(layers * per_layer):
            layer, part = divmod(depth, per_layer)
            readers[name, depth] = f"{name}.{layer}.layer.{part}.layer_norm"
    return readers


def preact_resnet_readers() -> dict[SiteKey, str]:
    """The second stage begins with a projection block, so its depth 0 is read by block 1."""
    readers = {("stages.0", depth): f"stages.0.{depth}.norm_1" for depth in range(9)}
    readers["stages.0", 9] = "stages.1.0.norm_1"
    for depth in range(3):
        readers["stages.1", depth] = f"stages.1.{depth + 1}.norm_1"
    readers["stages.1", 3] = "stages.2.0.norm_1"
    return readers


CASES = (
    OracleCase(
        name="llama",
        make_model=make_llama,
        make_inputs=make_padded_tokens,
        streams=oracles.llama_streams,
        oracle=oracles.llama_oracle,
        readers=llama_readers,
    ),
    OracleCase(
        name="gpt2",
        make_model=make_gpt2,
        make_inputs=lambda: {"input_ids": tokens(2, 7, VOCABULARY)},
        streams=oracles.gpt2_streams,
        oracle=oracles.gpt2_oracle,
        readers=gpt2_readers,
    ),
    OracleCase(
        name="gpt_neox",
        make_model=make_gpt_neox,
        make_inputs=lambda: {"input_ids": tokens(2, 7, VOCABULARY)},
        streams=oracles.gpt_neox_streams,
        oracle=oracles.gpt_neox_oracle,
        readers=gpt_neox_readers,
    ),
    OracleCase(
        name="t5",
        make_model=make_t5,
        make_inputs=lambda: {
            **make_padded_tokens(),
            "decoder_input_ids": tokens(2, 5, VOCABULARY),
        },
        streams=oracles.t5_streams,
        oracle=oracles.t5_oracle,
        readers=t5_readers,
    ),
    OracleCase(
        name="preact_resnet",
        make_model=make_preact_resnet,
        make_inputs=lambda: {"images": torch.randn(2, 3, 8, 8)},
        streams=oracles.preact_resnet_streams,
        oracle=oracles.preact_resnet_oracle,
        readers=preact_resnet_readers,
        is_language_model=False,
    ),
)
