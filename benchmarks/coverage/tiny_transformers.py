"""Tiny models of every architecture of the installed transformers, with inputs they accept.

A config is made small by the names of its fields (a hidden size is 32, a depth 3), sub-configs
included. Names are not enough for every architecture, so there are several recipes, from the
smallest to one that only cuts depth and vocabulary; the first whose model runs is taken.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, WIDTH, HEADS, LAYERS, IMAGE, PATCH = 96, 32, 4, 2, 32, 8
MOST_PARAMETERS = 40_000_000
BATCH, LENGTH = 2, 8

_SMALL: dict[str, int] = {
    **dict.fromkeys(
        "hidden_size d_model n_embd dim embed_dim embedding_size hidden_dim encoder_hidden_size "
        "decoder_hidden_size projection_dim text_hidden_size model_dim feature_size emb_dim "
        "d_embed embedding_dim word_embed_proj_dim conv_dim mask_feature_size fpn_feature_size "
        "encoder_embed_dim decoder_embed_dim vision_feature_dim width output_hidden_size "
        "out_hidden_size projector_hidden_size audio_hidden_size qformer_hidden_size "
        "decoder_hidden_dim encoder_hidden_dim attention_hidden_size lru_width q_lora_rank "
        "kv_lora_rank share_hidden_size backbone_hidden_size hidden_size_per_layer_input "
        "encoder_out_channels neck_hidden_size cross_attention_hidden_size".split(),
        WIDTH,
    ),
    **dict.fromkeys(
        "num_hidden_layers num_layers n_layer n_layers num_encoder_layers num_decoder_layers "
        "encoder_layers decoder_layers depth num_blocks num_hidden_groups n_blocks layers "
        "num_transformer_layers decoder_num_hidden_layers encoder_num_hidden_layers "
        "decoder_num_layers encoder_num_layers l_layers x_layers r_layers num_decoder_blocks "
        "prediction_num_hidden_layers predictor_num_hidden_layers pred_num_hidden_layers "
        "backbone_depth sparse_layers n_encoder_layers".split(),
        LAYERS,
    ),
    **dict.fromkeys(
        "num_attention_heads num_heads n_head n_heads encoder_attention_heads heads "
        "decoder_attention_heads num_key_value_heads attention_heads decoder_num_attention_heads "
        "encoder_num_attention_heads predictor_num_attention_heads pred_num_attention_heads "
        "mamba_num_heads linear_num_key_heads linear_num_value_heads num_kv_heads "
        "num_encoder_attention_heads num_decoder_attention_heads mamba_n_heads".split(),
        HEADS,
    ),
    **dict.fromkeys(
        "intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim n_inner d_inner "
        "hidden_dim_ffn dim_feedforward encoder_intermediate_size dff ffn_hidden_size "
        "decoder_intermediate_size decoder_ffn_intermediate_size shared_intermediate_size "
        "moe_intermediate_size shared_expert_intermediate_size mlp_dim feedforward_dim "
        "expert_ffn_hidden_size intermediate_size_mlp decoder_mlp_dim encoder_mlp_dim "
        "moe_shared_expert_intermediate_size".split(),
        2 * WIDTH,
    ),
    **dict.fromkeys(
        "head_dim d_kv attention_head_size linear_key_head_dim linear_value_head_dim v_head_dim "
        "qk_nope_head_dim qk_rope_head_dim mamba_d_head mamba_head_dim dim_head kv_channels "
        "head_size global_head_dim qk_head_dim".split(),
        WIDTH // HEADS,
    ),
    **dict.fromkeys(
        "num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts".split(),
        4,
    ),
    **dict.fromkeys("num_experts_per_tok moe_topk moe_k num_selected_experts top_k".split(), 2),
    **dict.fromkeys("n_group topk_group num_expert_groups moe_num_shared_experts".split(), 1),
    **dict.fromkeys(
        "mamba_n_groups n_groups num_mem_blocks first_k_dense_replace num_dense_layers".split(), 1
    ),
    **dict.fromkeys(
        "vocab_size vocab_size_per_layer_input text_vocab_size entity_vocab_size".split(),
        VOCABULARY,
    ),
    **dict.fromkeys(
        "max_position_embeddings n_positions max_source_positions max_target_positions "
        "max_seq_len sliding_window attention_window".split(),
        128,
    ),
    "image_size": IMAGE,
    "patch_size": PATCH,
    "num_queries": 8,
    "num_query_tokens": 8,
    "num_labels": 3,
    "num_latents": 8,
    "d_latents": WIDTH,
    "rotary_dim": 4,
    "num_mel_bins": 16,
    "prediction_length": 4,
    "spectrogram_length": 64,
    "state_size": 8,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
}
_EXPORTED = re.compile(r"^__all__ = \[(.*?)\]", re.DOTALL | re.MULTILINE)
_SHALLOW = frozenset(name for name, size in _SMALL.items() if size in (LAYERS, VOCABULARY))
_SHALLOW |= {"num_experts", "num_local_experts", "n_routed_experts"}

RECIPES: tuple[tuple[str, dict[str, int]], ...] = (
    ("tiny", _SMALL),
    ("tiny, image as it is", {k: v for k, v in _SMALL.items() if k not in ("image_size",)}),
    (
        "tiny, heads as they are",
        {k: v for k, v in _SMALL.items() if v != WIDTH // HEADS or k == "mlp_dim"},
    ),
    (
        "tiny, wider heads",
        {k: 2 * v if v == WIDTH // HEADS and "head" in k else v for k, v in _SMALL.items()},
    ),
    (
        "tiny, one wide head",
        {k: {WIDTH: 128, HEADS: 1, WIDTH // HEADS: 128}.get(v, v) for k, v in _SMALL.items()}
        | {"patch_size": PATCH, "state_size": 8, "num_experts": 4, "num_local_experts": 4},
    ),
    ("shallow", {name: size for name, size in _SMALL.items() if name in _SHALLOW}),
)


@functools.cache
def architectures() -> dict[str, str]:
    """By the name of a ``*Model`` or ``*For...`` class: the module of transformers it is in.

    Read from the text of the library: importing all of it takes a minute.
    """
    import transformers

    found: dict[str, str] = {}
    models = Path(str(transformers.__file__)).parent / "models"
    for file in sorted(models.glob("*/modeling_*.py")):
        exported = _EXPORTED.search(file.read_text(encoding="utf-8"))
        names = re.findall(r"[\"'](\w+)[\"']", exported[1]) if exported else []
        module = f"transformers.models.{file.parent.name}.{file.stem}"
        found.update(dict.fromkeys(filter(_is_architecture, names), module))
    return found


def family_of(name: str) -> str:
    """The folder of an architecture in transformers: ``llama``."""
    return architectures()[name].split(".")[2]


def build(name: str) -> tuple[nn.Module, dict[str, Any], str]:
    """A tiny model of an architecture in evaluation mode, inputs that it takes, and the recipe.

    Raises:
        ValueError: no recipe gives a model that runs; says why the first did not.
    """
    cls = getattr(importlib.import_module(architectures()[name]), name)
    if cls.forward is nn.Module.forward:
        raise ValueError("it has no forward: its parts are called one by one")
    failures = []
    for recipe, sizes in RECIPES:
        try:
            model = _model(cls, sizes)
            return model, _inputs(model), recipe
        except Exception as error:  # whatever a model raises that is not built as it wants to be
            text = str(error).strip().splitlines() or [""]
            failures.append(f"{recipe}: {type(error).__name__}: {text[0][:160]}")
    raise ValueError("; ".join(failures))


def tiny_config(config_class: Any, sizes: dict[str, int]) -> Any:
    """A config with fields of these names made small, sub-configs included."""
    default = config_class()
    return config_class(**_overrides(default, sizes))


def _overrides(config: Any, sizes: dict[str, int]) -> dict[str, Any]:
    fields = config.to_dict()
    names = {**getattr(config, "attribute_map", {}), **{name: name for name in fields}}
    chosen: dict[str, Any] = {}
    for name, field in names.items():
        if name not in sizes or field not in fields:
            continue
        small = _shrunk(fields[field], sizes[name])
        if small is not None:
            chosen.setdefault(field, small)
    vocabulary = chosen.get("vocab_size", fields.get("vocab_size"))
    if isinstance(vocabulary, int):
        chosen.update(_special_tokens(fields, vocabulary))
    if config.model_type == "timm_backbone":  # DETR and its like
        chosen |= {"backbone": "resnet18", "use_pretrained_backbone": False}
    if fields.get("vocab_size", 0) is None:  # ESM
        chosen["pad_token_id"] = 1
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if hasattr(part, "to_dict"):
            chosen[name] = type(part)(**_overrides(part, sizes))
    return chosen


def _shrunk(value: Any, size: int) -> Any:
    """The small value of a field, of the type it had; None to leave it alone."""
    if value is None and size == VOCABULARY:
        return size  # ESM's has to be said
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, int):
        return min(value, size) if value > 0 else None
    if isinstance(value, list | tuple) and value and all(isinstance(v, int) for v in value):
        largest = max(value)
        return type(value)(max(1, v * size // largest) if largest > size else v for v in value)
    return None


def _special_tokens(fields: dict[str, Any], vocabulary: int) -> dict[str, int]:
    """Ids beyond a small vocabulary, apart from each other and from the ids of inputs."""
    beyond = [
        name
        for name, value in fields.items()
        if name.endswith(("_token_id", "_token_index", "_id"))
        and isinstance(value, int)
        and value >= vocabulary
    ]
    return {name: max(vocabulary - 1 - index, 0) for index, name in enumerate(beyond)}


def _model(cls: Any, sizes: dict[str, int]) -> nn.Module:
    config = tiny_config(cls.config_class, sizes)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        count = sum(p.numel() for p in cls(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count:,} parameters are too many")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = cls(config).float().eval()
    return model


def _inputs(model: nn.Module) -> dict[str, Any]:
    """Keyword inputs with which the model runs: the fewest that will do."""
    first: Exception | None = None
    for kwargs in _candidates(model):
        try:
            with torch.no_grad():
                model(**kwargs)
        except Exception as error:
            first = first or error
            continue
        return kwargs
    raise first or ValueError("no inputs are known for its arguments")


def _candidates(model: Any) -> Iterator[dict[str, Any]]:
    parameters = inspect.signature(model.forward).parameters
    known = {name: value for name in parameters if (value := _input(name, model)) is not None}
    no_cache = {"use_cache": False} if "use_cache" in parameters else {}
    required = {
        name: value
        for name, value in known.items()
        if parameters[name].default is inspect.Parameter.empty
    }
    main = {n: known[n] for n in (model.main_input_name,) if n in known} | required
    decoder = {n: known[n] for n in ("decoder_input_ids",) if n in known}
    images = {n: known[n] for n in ("pixel_values",) if n in known}
    ids = {n: known[n] for n in ("input_ids",) if n in known}
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    if encoder_decoder and decoder:
        yield main | decoder | no_cache
    yield main | no_cache
    yield main | ids | no_cache
    yield main | ids | images | no_cache
    yield main | decoder | no_cache
    yield main | ids
    yield {**known, **no_cache}


def _input(name: str, model: Any) -> Tensor | None:
    config = model.config
    if name in ("input_ids", "decoder_input_ids"):
        return _tokens(config)
    if name == "attention_mask":
        return torch.ones(BATCH, LENGTH, dtype=torch.long)
    if name in ("pixel_values", "pixel_values_videos"):
        return _images(config, video=name.endswith("videos"))
    if name == "bbox":
        return torch.zeros(BATCH, LENGTH, 4, dtype=torch.long)
    if name == "input_features":
        bins = _first(config, "num_mel_bins", "input_feat_per_channel", "feature_size") or 80
        frames = 2 * (_first(config, "max_source_positions") or 50)
        transposed = hasattr(model, "get_encoder") and hasattr(config, "max_source_positions")
        return torch.randn(BATCH, bins, frames) if transposed else torch.randn(BATCH, frames, bins)
    if name == "input_values":
        if _first(config, "num_mel_bins", "max_length") and hasattr(config, "frequency_stride"):
            return torch.randn(BATCH, config.max_length, config.num_mel_bins)
        channels = _first(config, "audio_channels")
        return torch.randn(BATCH, *([channels] if channels else []), 4000)
    return None


def _tokens(config: Any) -> Tensor | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    words = _first(text, "vocab_size") or _first(config, "vocab_size")
    if not isinstance(words, int):
        return None
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


def _is_architecture(name: str) -> bool:
    return (name.endswith("Model") or "For" in name) and not name.endswith("PreTrainedModel")
