"""Generation with caches: a converted model decodes what it would without a cache.

Random queries; three prompts of different lengths, padded on the left; greedy, 32 tokens. The
tokens are recomputed by the same converted model from whole sequences, without a cache.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from conversions import convert_randomized
from zoo import by_name

NEW_TOKENS = 32
LENGTHS = (3, 5, 7)
PAD = 0
DECODERS = [
    "llama",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("gpt2", "qwen3", "gemma3", "mixtral")
    ),
]


def prompts(vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [3, 7] and mask, padded on the left."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, vocabulary, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = torch.tensor(
        [[int(i >= max(LENGTHS) - n) for i in range(max(LENGTHS))] for n in LENGTHS]
    )
    return ids * mask + PAD * (1 - mask), mask


@functools.cache
def converted_case(name: str) -> tuple[Any, nn.Module]:
    case = by_name(name)
    model = case.build()
    args, kwargs = case.inputs()
    return convert_randomized(model, args, kwargs), model


def greedy(model: Any, ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        pad_token_id=PAD,
        **options,
    )
    return tokens


def recomputed(model: Any, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The greedy token at every generated place, from one pass over the sequence before it."""
    prompt = mask.shape[1]
    whole = torch.cat([mask, mask.new_ones(len(mask), tokens.shape[1] - prompt)], dim=1)
    positions = (whole.cumsum(1) - 1).clamp(min=0)
    logits = model(
        input_ids=tokens, attention_mask=whole, use_cache=False, position_ids=positions
    ).logits
    chosen = logits[:, prompt - 1 : -1]
    end = model.generation_config.eos_token_id
    for token in [end] if isinstance(end, int) else end or []:
        chosen[..., token] = -torch.inf  # generation may not end early
    return chosen.argmax(-1)


both_caches = pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="dynamic_cache"),
        pytest.param({"cache_implementation": "static"}, id="static_cache"),
    ],
)


@both_caches
@pytest.mark.parametrize("name", DECODERS)
def test_generation_equals_recomputation(name: str, options: dict[str, str]) -> None:
    converted, plain = converted_case(name)
    ids, mask = prompts(int(converted.config.vocab_size))
    with torch.no_grad():
        tokens = greedy(converted, ids, mask, **options)
        assert torch.equal(tokens[:, ids.shape[1] :], recomputed(converted, tokens, mask))
        # Negative twin: the unconverted model would have said something else.
        assert not torch.equal(tokens[:, ids.shape[1] :], recomputed(plain, tokens, mask))


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"cache_implementation": "static"}, marks=pytest.mark.slow)],
    ids=str,
)
def test_encoder_decoder_generation_equals_recomputation(options: dict[str, str]) -> None:
    converted, plain = converted_case("t5")
    ids, mask = prompts(int(converted.config.vocab_size))
    with torch.no_grad():
        tokens = greedy(converted, ids, mask, **options)
        for model, same in ((converted, True), (plain, False)):
            logits = model(
                input_ids=ids, attention_mask=mask, decoder_input_ids=tokens, use_cache=False
            ).logits[:, :-1]
            logits[..., model.generation_config.eos_token_id] = -torch.inf
            assert torch.equal(tokens[:, 1:], logits.argmax(-1)) is same
