"""What no rule covers: fields and inputs that a family of transformers cannot do without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_TWO_ROPES = {"full_attention": _ROPE, "sliding_attention": _ROPE}
_FOUR_STATES = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}
_DEPTHS = {
    "backbone_config": {"model_type": "dinov2", **_FOUR_STATES, "reshape_hidden_states": False},
    "reassemble_hidden_size": 32,
}
_NARROW = {"width_coefficient": 0.25, "depth_coefficient": 1.0, "hidden_dim": 128}
_FOUR_STAGES = {
    "backbone_config": {
        "model_type": "swin",
        "image_size": 128,
        "patch_size": 4,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }
}
_ONE_PATCH = {"image_size": 16, "patch_size": 4}

FIELDS: Mapping[str, Mapping[str, Any]] = {
    "AlignConfig": {"projection_dim": 80},
    "AlignVisionConfig": _NARROW,
    "AutoformerConfig": {"prediction_length": 4, "context_length": 8, "label_length": 4},
    "Blip2Config": {"image_token_index": 90},
    "BltConfig": {"encoder_hash_byte_group_vocab": 64},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 90, "IMGIMGBZ": 91}},
    "CHMv2Config": {
        "backbone_config": {
            "model_type": "dinov3_vit",
            "return_class_token": True,
            **_FOUR_STATES,
        }
    },
    "CohereCompassConfig": {"rope_parameters": _TWO_ROPES},
    "CohereCompassTextConfig": {"rope_parameters": _TWO_ROPES},
    "CvtConfig": {"depth": [1, 2, 3]},
    "DbrxAttentionConfig": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse"]},
    "DepthAnythingConfig": _DEPTHS,
    "DepthProConfig": {
        "patch_size": 16,
        "intermediate_hook_ids": [1, 0],
        "image_model_config": _ONE_PATCH,
        "patch_model_config": _ONE_PATCH,
        "fov_model_config": _ONE_PATCH,
    },
    "DiffusionGemmaTextConfig": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
    "Dots1Config": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "EfficientNetConfig": _NARROW,
    "Emu3Config": {"vocabulary_map": {"<image>": 90, "<|extra_200|>": 91}},
    "Emu3VQVAEConfig": {"base_channels": 32, "num_res_blocks": 1},
    "FunAsrNanoConfig": {
        "adaptor_config": {"intermediate_size": 8, "hidden_size": 32},
        "text_config": {"model_type": "qwen3", "hidden_size": 32},
    },
    "Gemma3nTextConfig": {"num_kv_shared_layers": 0},
    "Gemma4AssistantConfig": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "Gemma4UnifiedTextConfig": {"num_kv_shared_layers": 0},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "InstructBlipConfig": {"image_token_index": 90},
    "InstructBlipVideoConfig": {"video_token_index": 90},
    "Kosmos2Config": {"latent_query_num": 8},
    "Lfm2MoeConfig": {
        "layer_types": ["conv", "full_attention"],
        "num_hidden_layers": 2,
        "num_dense_layers": 1,
    },
    "LwDetrConfig": {
        "backbone_config": {
            "model_type": "lw_detr_vit",
            "image_size": 64,
            "num_windows": 4,
            "window_block_indices": [0, 2],
            **_FOUR_STATES,
        },
        "projector_scale_factors": [1.0],
    },
    "HunYuanVLTextConfig": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 1, 1]}},
    "Mask2FormerConfig": _FOUR_STAGES,
    "MiMoV2FlashConfig": {"num_key_value_heads": 2},
    "Molmo2AdapterConfig": {"vision_feature_layer": [1, 0]},
    "MoonshineStreamingConfig": {"num_key_value_heads": 4},
    "OneFormerConfig": _FOUR_STAGES,
    "OpenAIPrivacyFilterConfig": {"experts_implementation": "grouped_mm"},
    "Pix2StructTextConfig": {"initializer_range": 0.02},
    "PromptDepthAnythingConfig": _DEPTHS,
    "ShieldGemma2Config": {"yes_token_index": 5, "no_token_index": 6},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 64},
    "Qwen4ExpTextConfig": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "num_hidden_layers": 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
}
"""By the name of a config class: fields it gets whatever the recipe; a dict is for a sub-config."""


def _time_series(model: Any) -> dict[str, Any]:
    """Values, features and masks of a past long enough for all lags, and of the future."""
    config = model.config
    past = config.context_length + max(config.lags_sequence)
    features = config.num_time_features

    return {
        "past_values": torch.randn(2, past),
        "past_time_features": torch.randn(2, past, features),
        "past_observed_mask": torch.ones(2, past),
        "future_values": torch.randn(2, config.prediction_length),
        "future_time_features": torch.randn(2, config.prediction_length, features),
        "use_cache": False,
    }


def _decisions(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "states": torch.randn(2, 4, config.state_dim),
        "actions": torch.randn(2, 4, config.act_dim),
        "rewards": torch.randn(2, 4, 1),
        "returns_to_go": torch.randn(2, 4, 1),
        "timesteps": torch.arange(4).repeat(2, 1),
        "attention_mask": torch.ones(2, 4),
    }


def _image_tokens(model: Any) -> dict[str, Any]:
    """BLIP: as many image tokens as there are queries, and text for the query transformer."""
    config = model.config
    count, side, frames = config.num_query_tokens, config.vision_config.image_size, ()
    token = getattr(config, "image_token_index", None)
    if token is None:
        token, count, frames = config.video_token_index, 2 * count, (2,)
    inputs = {
        "pixel_values": torch.randn(2, *frames, 3, side, side),
        "input_ids": torch.cat([torch.full((2, count), token), _tokens(2)], dim=1),
    }
    if "Instruct" in type(model).__name__:
        inputs |= {
            "qformer_input_ids": _tokens(2),
            "qformer_attention_mask": torch.ones(2, 8, dtype=torch.long),
        }
    return inputs


def _image_positions(model: Any) -> dict[str, Any]:
    config = model.config
    side, mask = config.vision_config.image_size, torch.zeros(2, 16)
    mask[:, 1 : 1 + config.latent_query_num] = 1
    return {
        "pixel_values": torch.randn(2, 3, side, side),
        "input_ids": torch.cat([_tokens(2), _tokens(2)], dim=1),
        "image_embeds_position_mask": mask,
        "use_cache": False,
    }


def _attended_images(model: Any) -> dict[str, Any]:
    side = model.config.vision_config.image_size
    return {
        "input_ids": _tokens(2),
        "attention_mask": torch.ones(2, 8, dtype=torch.long),
        "pixel_values": torch.randn(2, 1, 3, side, side),
        "image_attention_mask": torch.ones(2, 8, 1, dtype=torch.long),
        "use_cache": False,
    }


def _classes_and_tasks(model: Any) -> dict[str, Any]:
    side = model.config.image_size
    return {
        "pixel_values": torch.randn(2, 3, side, side),
        "classes_input_ids": _tokens(4),
        "classes_attention_mask": torch.ones(4, 8, dtype=torch.long),
        "tasks_input_ids": _tokens(2),
        "tasks_attention_mask": torch.ones(2, 8, dtype=torch.long),
        "classes_structure": torch.tensor([2, 2]),
    }


def _stacked_spectrograms(model: Any) -> dict[str, Any]:
    config = model.config.encoder_config
    return {"input_features": torch.randn(2, 64, 4 * config.num_mel_bins)}


def _images_and_tasks(model: Any) -> dict[str, Any]:
    length = model.config.task_seq_len
    return {"pixel_values": torch.randn(2, 3, 128, 128), "task_inputs": torch.rand(2, length)}


def _four_patches(model: Any) -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 64, 64)}


def _masked_pairs(model: Any) -> dict[str, Any]:
    """With both masks: a model that makes its own does so from the data, or not in a capture."""
    return {
        "input_ids": _tokens(2),
        "attention_mask": torch.ones(2, 8, dtype=torch.long),
        "decoder_input_ids": _tokens(2),
        "decoder_attention_mask": torch.ones(2, 8, dtype=torch.long),
        "use_cache": False,
    }


def _prompted_images(model: Any) -> dict[str, Any]:
    """The prompt is put above the image, so that both have half its height."""
    height, width = model.config.image_size
    sizes = (2, 3, height // 2, width)
    names = ("pixel_values", "prompt_pixel_values", "prompt_masks")
    return {name: torch.randn(*sizes) for name in names}


def _speech_and_text(model: Any) -> dict[str, Any]:
    return {
        "input_values": torch.randn(2, 4000),
        "decoder_input_ids": _tokens(2),
        "use_cache": False,
    }


def _images_as_states(model: Any) -> dict[str, Any]:
    return {"hidden_states": torch.randn(2, 3, 64, 64)}


def _spectrograms(model: Any) -> dict[str, Any]:
    mels = model.config.audio_config.num_mel_bins
    return {"input_ids": _tokens(2), "input_features": torch.randn(2, 1, 64, mels)}


def _visual_features(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "input_ids": _tokens(2),
        "visual_feats": torch.randn(2, 5, config.visual_feat_dim),
        "visual_pos": torch.rand(2, 5, config.visual_pos_dim),
    }


def _denoising(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "noise_embeds": torch.randn(2, config.block_size, config.hidden_size),
        "context_hidden_states": torch.randn(
            2, 8, config.hidden_size * len(config.target_layer_ids)
        ),
        "use_cache": False,
    }


def _byte_embeddings(model: Any) -> dict[str, Any]:
    return {"inputs": torch.randn(2, 8, model.config.d_model)}


def _decision(model: Any) -> dict[str, Any]:
    return {
        "input_ids": _tokens(1),
        "marks": torch.tensor([[3, 7]]),
        "num_options": torch.tensor([[2, 2]]),
        "question_type_ids": torch.tensor([[0, 0]]),
    }


def _wide_text_line(model: Any) -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 96, 320)}


def _tokens(batch: int) -> torch.Tensor:
    return torch.randint(3, 60, (batch, 8), generator=torch.Generator().manual_seed(1))


INPUTS: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "AutoformerModel": _time_series,
    "ClapModel": _spectrograms,
    "Blip2Model": _image_tokens,
    "DepthProModel": _four_patches,
    "FSMTModel": _masked_pairs,
    "GraniteSpeech5ForCTC": _stacked_spectrograms,
    "IdeficsModel": _attended_images,
    "InstructBlipModel": _image_tokens,
    "InstructBlipVideoModel": _image_tokens,
    "Kosmos2Model": _image_positions,
    "OneFormerModel": _images_and_tasks,
    "OmDetTurboForObjectDetection": _classes_and_tasks,
    "DecisionTransformerModel": _decisions,
    "InformerModel": _time_series,
    "JevForDecision": _decision,
    "LongT5Model": _masked_pairs,
    "LxmertModel": _visual_features,
    "MuseGlimmerAssistantModel": _denoising,
    "PerceiverModel": _byte_embeddings,
    "PPOCRV5MobileDetModel": _images_as_states,
    "PPOCRV5MobileRecModel": _wide_text_line,
    "PPOCRV5ServerRecModel": _wide_text_line,
    "SegGptModel": _prompted_images,
    "SpeechEncoderDecoderModel": _speech_and_text,
    "SwitchTransformersModel": _masked_pairs,
    "TimeSeriesTransformerModel": _time_series,
}
"""By the name of a model's class: the keyword inputs for it."""
