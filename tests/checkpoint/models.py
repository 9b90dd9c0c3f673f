"""One small model of each family that checkpoints are tested with, and how to train it a little."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import attnres_compile
from conversions import tower, tower_inputs
from zoo_case import perturb

TOKENS = torch.arange(4, 18).reshape(2, 7)
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}


@dataclasses.dataclass(frozen=True)
class Example:
    """A model of a family and the inputs of one call."""

    name: str
    make: Callable[[], nn.Module]
    kwargs: Callable[[], dict[str, Any]]
    args: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return self.name

    def build(self, dtype: torch.dtype = torch.float32) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            model = self.make().eval()
            perturb(model)
        return model.to(dtype)

    def call(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(12)
            inputs = self.kwargs()
        return {n: v.to(dtype) if v.is_floating_point() else v for n, v in inputs.items()}


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            **SMALL,
            vocab_size=96,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=32)
    )


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    )


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        # without biases of keys, whose gradient is zero but for rounding
        ViTConfig(**SMALL, num_attention_heads=4, image_size=16, patch_size=8, qkv_bias=False)
    )


LLAMA = Example("llama", llama, lambda: {"input_ids": TOKENS})
GPT2 = Example("gpt2", gpt2, lambda: {"input_ids": TOKENS})
T5 = Example("t5", t5, lambda: {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :4]})
VIT = Example("vit", vit, lambda: {"pixel_values": torch.randn(2, 3, 16, 16)})
CUSTOM = Example("custom", tower, lambda: {"x": tower_inputs()})
TRANSFORMERS = (LLAMA, GPT2, T5, VIT)
ALL = (*TRANSFORMERS, CUSTOM)


def first_output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        output: Any = model(**inputs)
    return output if isinstance(output, Tensor) else output[0]


def train(converted: Any, inputs: dict[str, Any], *, only_new: bool = False) -> None:
    """Three steps on a made-up loss."""
    parameters = dict(converted.named_parameters())
    new = [p for n, p in parameters.items() if ".attnres." in f".{n}"]
    trained = new if only_new else list(parameters.values())
    optimizer = torch.optim.SGD(trained, lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        output = converted(**inputs)
        logits = output if isinstance(output, Tensor) else output[0]
        logits.float().square().mean().backward()
        optimizer.step()
    queries = [p for n, p in parameters.items() if n.endswith(".query")]
    assert all(bool(query.any()) for query in queries)


def same_tensors(first: nn.Module, second: nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(
        torch.equal(one[n], two[n]) and one[n].dtype == two[n].dtype for n in one
    )


def bytes_in(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def converted(example: Example, **options: Any) -> Any:
    """A converted copy of an example."""
    config = attnres_compile.AttnResConfig(**options) if options else None
    return attnres_compile.convert(example.build(), (), example.call(), config=config)
