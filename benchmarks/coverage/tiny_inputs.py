"""Small inputs for a tiny model of transformers, made by the names of forward's arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tiny_configs import IMAGE, VOCABULARY
from tiny_input_exceptions import INPUTS

BATCH, LENGTH = 2, 8
_BINS = (
    "num_mel_bins",
    "input_feat_per_channel",
    "feature_projection_input_dim",
    "feature_size",
)
Inputs = dict[str, Any]


def inputs_of(model: Any) -> Inputs:
    """Keyword inputs with which the model runs: the fewest that will do.

    Raises:
        Exception: what the model raised at the first of the candidates.
    """
    first: Exception | None = None
    tried: list[dict[str, Any]] = []
    for kwargs in _candidates(model):
        shapes = {name: getattr(value, "shape", value) for name, value in kwargs.items()}
        if shapes in tried:
            continue
        tried.append(shapes)
        try:
            with torch.no_grad():
                _check_numbers(model(**kwargs))
        except Exception as error:
            first = first or error
            continue
        return kwargs
    raise first or ValueError("no inputs are known for its arguments")


def _check_numbers(outputs: Any) -> None:
    leaves = tree_leaves(dict(outputs) if isinstance(outputs, Mapping) else outputs)
    if any(isinstance(leaf, Tensor) and bool(leaf.isnan().any()) for leaf in leaves):
        raise ValueError("it returns values that are not a number")


def _candidates(model: Any) -> Iterator[Inputs]:
    if type(model).__name__ in INPUTS:
        yield INPUTS[type(model).__name__](model)
        return
    parameters = inspect.signature(model.forward).parameters
    plain = {name: value for name in parameters if (value := _input(name, model)) is not None}
    required = {n for n, p in parameters.items() if p.default is inspect.Parameter.empty}
    for other_shape in _SHAPES:
        known = other_shape(dict(plain), model)
        yield from _choices(model, parameters, known, required)


def _choices(model: Any, parameters: Any, known: Inputs, required: set[str]) -> Iterator[Inputs]:
    """The fewest inputs first: the main one, then with others that models ask for."""
    no_cache = {"use_cache": False} if "use_cache" in parameters else {}

    def those(*names: str) -> Inputs:
        return {name: known[name] for name in names if name in known}

    named = model.main_input_name
    main = those(*([named] if isinstance(named, str) else named), *required)
    decoder = those("decoder_input_ids")
    if getattr(model.config, "is_encoder_decoder", False) and decoder:
        yield main | decoder | no_cache
    yield main | no_cache
    yield main | those("input_ids") | no_cache
    yield main | those("input_ids", "pixel_values") | no_cache
    yield main | decoder | no_cache
    yield main | those("input_ids")
    yield main | those("input_ids", "attention_mask") | no_cache
    yield {**known, **no_cache}


def _as_named(known: Inputs, model: Any) -> Inputs:
    return known


def _with_channels(known: Inputs, model: Any) -> Inputs:
    """Sound with one channel, pairs of images."""
    for name in ("input_values",):
        if name in known and known[name].ndim == 2:
            known[name] = known[name].unsqueeze(1)
    if "pixel_values" in known:
        known["pixel_values"] = torch.stack([known["pixel_values"], known["pixel_values"]], 1)
    return known


def _transposed(known: Inputs, model: Any) -> Inputs:
    """Spectrograms the other way round."""
    if "input_features" in known:
        known["input_features"] = known["input_features"].mT
    return known


def _with_codebooks(known: Inputs, model: Any, *, also: int = 0) -> Inputs:
    """Tokens of several codebooks at a time, of the decoder only where there is one."""
    books = _first(model.config, "num_codebooks", "n_codebooks", "num_channels")
    name = "decoder_input_ids" if "decoder_input_ids" in known else "input_ids"
    if name in known and isinstance(books, int):
        known[name] = known[name].unsqueeze(-1).repeat(1, 1, books + also)
    return known


def _with_codebooks_and_text(known: Inputs, model: Any) -> Inputs:
    return _with_codebooks(known, model, also=1)


_SHAPES: tuple[Callable[[Inputs, Any], Inputs], ...] = (
    _as_named,
    _with_channels,
    _transposed,
    _with_codebooks,
    _with_codebooks_and_text,
)
"""What inputs of a name may look like; the first is what most models want."""


def _input(name: str, model: Any) -> Tensor | None:
    config = model.config
    if name.endswith("input_ids"):
        return _tokens(config)
    if name.endswith("attention_mask"):
        return torch.ones(BATCH, LENGTH, dtype=torch.long)
    if name in ("pixel_values", "pixel_values_videos"):
        return _images(config, video=name.endswith("videos"))
    if name == "bbox":
        return torch.zeros(BATCH, LENGTH, 4, dtype=torch.long)
    if name == "input_features":
        bins = _first(config, *_BINS) or 80
        frames = 2 * (_first(config, "max_source_positions") or 50)
        transposed = hasattr(model, "get_encoder") and hasattr(config, "max_source_positions")
        return torch.randn(BATCH, bins, frames) if transposed else torch.randn(BATCH, frames, bins)
    if name == "input_values":
        if _first(config, "num_mel_bins", "max_length") and hasattr(config, "frequency_stride"):
            return torch.randn(BATCH, config.max_length, config.num_mel_bins)
        channels = _first(config, "audio_channels")
        return torch.randn(BATCH, *([channels] if channels else []), 4000)
    if name == "past_values":
        channels = _first(config, "num_input_channels")
        length = _first(config, "context_length") or 2 * LENGTH
        return torch.randn(BATCH, length, *([channels] if channels else []))
    return None


def _tokens(config: Any) -> Tensor:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    words = _first(text, "vocab_size") or _first(config, "vocab_size")
    words = words if isinstance(words, int) else VOCABULARY  # CANINE hashes any number
    generator = torch.Generator().manual_seed(1)
    low, high = min(3, words - 1), max(words - 24, min(4, words))
    return torch.randint(low, high, (BATCH, LENGTH), generator=generator)


def _images(config: Any, *, video: bool) -> Tensor:
    parts = [
        getattr(config, part, None) for part in ("vision_config", "encoder", "backbone_config")
    ]
    config = next((c for c in (config, *parts) if _first(c, "image_size")), config)
    size = _first(config, "image_size") or 2 * IMAGE
    sides = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    frames = [_first(config, "num_frames") or 4] if video or hasattr(config, "num_frames") else []
    generator = torch.Generator().manual_seed(2)
    channels = _first(config, "num_channels", "in_channels") or 3
    return torch.randn(BATCH, *frames, channels, *sides, generator=generator)


def _first(config: Any, *names: str) -> Any:
    """The first of these fields that a config has, or else its sub-configs."""
    found = next((v for n in names if (v := getattr(config, n, None)) is not None), None)
    if found is not None:
        return found
    parts = [getattr(config, part, None) for part in getattr(config, "sub_configs", {})]
    inner = (_first(part, *names) for part in parts if part is not None)
    return next((value for value in inner if value is not None), None)
