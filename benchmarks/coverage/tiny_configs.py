"""Configs of transformers made small by the names of their fields, sub-configs included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tiny_exceptions import FIELDS

VOCABULARY, WIDTH, HEADS, LAYERS, IMAGE, PATCH = 96, 32, 4, 2, 32, 8

_SMALL: dict[str, int] = {
    **dict.fromkeys(
        "hidden_size d_model n_embd dim embed_dim embedding_size hidden_dim encoder_hidden_size "
        "decoder_hidden_size projection_dim text_hidden_size model_dim feature_size emb_dim "
        "d_embed embedding_dim word_embed_proj_dim conv_dim mask_feature_size fpn_feature_size "
        "fpn_hidden_size "
        "encoder_embed_dim decoder_embed_dim vision_feature_dim width output_hidden_size "
        "out_hidden_size projector_hidden_size audio_hidden_size qformer_hidden_size "
        "decoder_hidden_dim encoder_hidden_dim attention_hidden_size lru_width q_lora_rank "
        "kv_lora_rank share_hidden_size backbone_hidden_size hidden_size_per_layer_input "
        "encoder_out_channels decoder_in_channels neck_hidden_size "
        "cross_attention_hidden_size cross_hidden_size hidden_size_global".split(),
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
        "encoder_num_attention_heads swa_num_attention_heads swa_num_key_value_heads "
        "predictor_num_attention_heads pred_num_attention_heads "
        "mamba_num_heads linear_num_key_heads linear_num_value_heads num_kv_heads "
        "num_encoder_attention_heads num_decoder_attention_heads mamba_n_heads "
        "cross_num_attention_heads cross_num_key_value_heads".split(),
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
        "head_size global_head_dim qk_head_dim swa_head_dim swa_v_head_dim "
        "cross_head_dim".split(),
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
_FEW = ("num_experts", "num_local_experts", "n_routed_experts")
_SHALLOW = {
    name: size for name, size in _SMALL.items() if size in (LAYERS, VOCABULARY) or name in _FEW
}
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers")


@dataclass(frozen=True)
class Recipe:
    """How a config is made small.

    Attributes:
        sizes: by name of a field, the largest value it keeps.
        fills: fields of these names that have no value get one too, lists with an entry per layer
            are cut to the new depth, and sub-configs keep what the config around them sets.
    """

    name: str
    sizes: Mapping[str, int]
    fills: bool = False


def _one_head(width: int) -> dict[str, int]:
    sizes = {WIDTH: width, HEADS: 1, WIDTH // HEADS: width}
    kept = {"patch_size": PATCH, "state_size": 8, "num_experts": 4, "num_local_experts": 4}
    return {name: sizes.get(size, size) for name, size in _SMALL.items()} | kept


RECIPES: tuple[Recipe, ...] = (
    Recipe("tiny", _SMALL),
    Recipe("tiny, what is not given too", _SMALL, fills=True),
    Recipe("tiny, image as it is", {k: v for k, v in _SMALL.items() if k != "image_size"}),
    Recipe(
        "tiny, heads as they are",
        {k: v for k, v in _SMALL.items() if v != WIDTH // HEADS or k == "mlp_dim"},
    ),
    Recipe(
        "tiny, wider heads",
        {k: 2 * v if v == WIDTH // HEADS and "head" in k else v for k, v in _SMALL.items()},
    ),
    Recipe("tiny, one head of 64", _one_head(64), fills=True),
    Recipe("tiny, one wide head", _one_head(128)),
    Recipe("shallow", _SHALLOW),
    Recipe("shallow, what is not given too", _SHALLOW, fills=True),
)


def recipe(name: str) -> Recipe:
    """The recipe of this name."""
    return next(each for each in RECIPES if each.name == name)


def tiny_config(config_class: Any, how: Recipe) -> Any:
    """A config with fields of the recipe's names made small, sub-configs included."""
    return config_class(**_fields(config_class, {}, how))


def _fields(config_class: Any, given: Mapping[str, Any], how: Recipe) -> dict[str, Any]:
    """The arguments of a config: what its class always needs, what is `given`, and small sizes."""
    fixed = _merged(FIELDS.get(config_class.__name__, {}), given)
    return _small(config_class(**fixed), fixed, how)


def _small(default: Any, fixed: Mapping[str, Any], how: Recipe) -> dict[str, Any]:
    fields = default.to_dict()
    chosen = _small_fields(default, fields, how)
    vocabulary = chosen.get("vocab_size", fields.get("vocab_size"))
    if isinstance(vocabulary, int):
        chosen.update(_special_tokens(fields, vocabulary))
    if default.model_type == "timm_backbone":  # DETR and its like
        chosen |= {"backbone": "resnet18", "use_pretrained_backbone": False}
    if fields.get("vocab_size", 0) is None:  # ESM
        chosen["pad_token_id"] = 1
    parts = getattr(default, "sub_configs", {})
    for name in parts:
        part = getattr(default, name, None)
        if hasattr(part, "to_dict"):
            chosen[name] = type(part)(**_part(part, fixed.get(name), how))
    return chosen | {name: value for name, value in fixed.items() if name not in parts}


def _part(part: Any, fixed: Any, how: Recipe) -> dict[str, Any]:
    """The arguments of a sub-config."""
    given = _merged(FIELDS.get(type(part).__name__, {}), fixed if isinstance(fixed, dict) else {})
    if not how.fills:
        return _fields(type(part), given, how)
    plain = type(part)().to_dict()
    parts = getattr(part, "sub_configs", {})
    kept = {k: v for k, v in part.to_dict().items() if k in plain and plain[k] != v}
    arguments = {**{k: v for k, v in kept.items() if k not in parts}, **_small(part, given, how)}
    if "out_indices" in given:  # the same layers by another name
        arguments.pop("out_features", None)
    return arguments


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(first)
    for name, value in second.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merged(merged[name], value) if both else value
    return merged


def _small_fields(default: Any, fields: Mapping[str, Any], how: Recipe) -> dict[str, Any]:
    names = {**getattr(default, "attribute_map", {}), **{name: name for name in fields}}
    chosen: dict[str, Any] = {}
    for name, field in names.items():
        if name not in how.sizes or field not in fields or field == "num_stages":
            continue  # stages are no layers: widths and depths are lists with an entry for each
        small = _shrunk(fields[field], how.sizes[name], fills=how.fills)
        if small is not None:
            chosen.setdefault(field, small)
    if how.fills:
        chosen |= _cut_to_depth({**fields, **chosen}, fields)
    return chosen


def _cut_to_depth(small: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Lists with an entry per layer, one entry of each kind first, for as many layers as it has."""
    depth = next((name for name in _DEPTHS if isinstance(small.get(name), int)), None)
    if depth is None or not fields[depth] or fields[depth] <= small[depth]:
        return {}
    cut: dict[str, Any] = {}
    for name, value in small.items():
        if isinstance(value, list | tuple) and len(value) == fields[depth]:
            first_of_kind = {repr(kind): index for index, kind in reversed([*enumerate(value)])}
            places = sorted({*first_of_kind.values()})[: small[depth]]
            places += [i for i in range(len(value)) if i not in places][
                : small[depth] - len(places)
            ]
            cut[name] = [value[index] for index in sorted(places)]
    return cut


def _shrunk(value: Any, size: int, *, fills: bool) -> Any:
    """The small value of a field, of the type it had; None to leave it alone."""
    if value is None and (fills or size == VOCABULARY):
        return size  # ESM's vocabulary has to be said
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, int):
        return min(value, size) if value > 0 else None
    if isinstance(value, list | tuple) and value and all(isinstance(v, int) for v in value):
        largest = max(value)
        return type(value)(max(1, v * size // largest) if largest > size else v for v in value)
    return None


def _special_tokens(fields: Mapping[str, Any], vocabulary: int) -> dict[str, int]:
    """Ids beyond a small vocabulary, apart from each other and from the ids of inputs."""
    beyond = [
        name
        for name, value in fields.items()
        if name.endswith(("_token_id", "_token_index", "_id"))
        and isinstance(value, int)
        and value >= vocabulary
    ]
    return {name: max(vocabulary - 1 - index, 0) for index, name in enumerate(beyond)}
