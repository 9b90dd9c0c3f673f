"""How a tiny model of the transformers library becomes a case."""

from __future__ import annotations

from typing import Any

from torch import nn

from zoo_case import Case, Inputs, images, tokens

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}


def make(model: str, config: str, settings: dict[str, Any]) -> nn.Module:
    # Imported here: the library takes seconds, and many tests need none of its models.
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**settings))


def token_inputs() -> Inputs:
    return (), {"input_ids": tokens()}


def token_model(
    name: str,
    model: str,
    config: str,
    settings: dict[str, Any],
    *,
    depths: tuple[int, ...],
    counted_in: str,
    **rest: Any,
) -> Case:
    """A language model with one stream per entry of `depths`, every addition followed by a read."""
    return Case(
        name=name,
        make_model=lambda: make(model, config, settings),
        make_inputs=rest.pop("make_inputs", token_inputs),
        residual_additions=sum(depths),
        depths=depths,
        sublayers=rest.pop("sublayers", depths),
        counted_in=counted_in,
        has_cache=rest.pop("has_cache", True),
        **rest,
    )


def vision(name: str, model: str, config: str, settings: dict[str, Any], **rest: Any) -> Case:
    depths = rest.pop("depths")
    return Case(
        name=name,
        make_model=lambda: make(model, config, settings),
        make_inputs=lambda: ((), {"pixel_values": images()}),
        residual_additions=sum(depths),
        depths=depths,
        sublayers=depths,
        **rest,
    )
