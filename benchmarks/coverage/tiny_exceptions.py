"""What no rule covers: fields that a family of transformers cannot do without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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
_TWO_OF_TWO = {
    "num_hidden_layers": 4,
    "attention_hidden_size": 64,  # the states beside the embeddings
    "attention_head_dim": 16,
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
}
_LINES: dict[
    str, Callable[[int], list[list[int]]]
] = {  # in the long direction, the short one and both: kernel, stride and padding
    "vertical_long_to_small_conv": lambda size: [[size, 1], [1, 1], [size // 2, 0]],
    "horizontal_small_to_long_conv": lambda size: [[1, size], [1, 1], [0, size // 2]],
    "symmetric_conv_long": lambda size: [[size, size], [1, 1], [size // 2, size // 2]],
}
_TEXT_DETECTION = {
    "intraclass_block_config": {
        "reduce_channel": [1, 1, 0],
        "return_channel": [1, 1, 0],
        **{
            f"{name}_{ratio}ratio": made(size)
            for name, made in _LINES.items()
            for ratio, size in (("long", 7), ("mid", 5), ("short", 3))
        },
    },
    "scale_factor_list": [1, 2, 4, 8],
    "kernel_list": [3, 2, 2],
}
_LIGHT_STAGES = {
    "model_type": "pp_lcnet_v4",
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
    "block_configs": [
        [[3, before, after, stride, False], [3, after, after, 1, True]]
        for before, after, stride in ((96, 96, 1), (96, 96, 2), (96, 192, 2), (192, 384, 2))
    ],
}
_MAPS_OF_128 = {"backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]]}
_CODEC = {"num_filters": 8, "depths": [1, 1, 1], "downsampling_ratios": [2, 2]}
_TINY_BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_TINY_BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 96}

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
    "EdgeTamPromptEncoderConfig": {"image_size": 128, "patch_size": 16},
    "EdgeTamVisionConfig": {
        **_MAPS_OF_128,
        "backbone_config": {
            "model_type": "timm_wrapper",
            "architecture": "repvit_m1",
            "num_classes": 3,
            "model_args": {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]},
        },
    },
    "EfficientNetConfig": {**_NARROW, "hidden_dim": 320},
    "Emu3Config": {"vocabulary_map": {"<image>": 90, "<|extra_200|>": 91}},
    "Emu3VQVAEConfig": {"base_channels": 32, "num_res_blocks": 1},
    "FastVlmConfig": {
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "fastvit_t8",
            "hidden_size": 768,
            "num_classes": 0,
        }
    },
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
    "NeuCodecConfig": {"quantization_dim": 64},
    "OmDetTurboConfig": {
        "backbone_config": {"model_type": "timm_backbone", "out_indices": [2, 3, 4]},
        "vision_features_channels": [32, 32, 32],
        "encoder_in_channels": [128, 256, 512],  # of the ResNet that stands for a backbone
        "apply_layernorm_after_vision_backbone": False,
        "text_config": {"model_type": "clip_text_model", "hidden_size": 64},
        "text_projection_in_dim": 64,
        "text_projection_out_dim": 64,
        "class_embed_dim": 64,  # as wide as the text, and no narrower than the decoder
    },
    "OneFormerConfig": _FOUR_STAGES,
    "OpenAIPrivacyFilterConfig": {"experts_implementation": "grouped_mm"},
    "PerceptionLMConfig": {
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_core_large_patch14_336",
            "model_args": {
                "embed_dim": 64,
                "img_size": [28, 28],
                "depth": 2,
                "global_pool": "",
                "use_post_transformer_norm": False,
                "init_values": 0.1,
                "ref_feat_shape": [2, 2],
            },
        },
    },
    "Pix2StructTextConfig": {"initializer_range": 0.02},
    "PPOCRV5ServerDetConfig": _TEXT_DETECTION,
    "PPOCRV6MediumDetConfig": {**_TEXT_DETECTION, "backbone_config": _LIGHT_STAGES},
    "PPOCRV6SmallDetConfig": {
        "backbone_config": _LIGHT_STAGES,
        "layer_list_out_channels": [96, 96, 192, 384],
    },
    "PromptDepthAnythingConfig": _DEPTHS,
    "RagConfig": {
        "question_encoder": {"model_type": "dpr", **_TINY_BERT},
        "generator": {"model_type": "bart", **_TINY_BART},
        "n_docs": 2,
    },
    "Sam2HieraDetConfig": {"image_size": [128, 128], "hidden_size": 96},
    "Sam2PromptEncoderConfig": {"image_size": 128, "patch_size": 16},
    "Sam2VisionConfig": _MAPS_OF_128,
    "Sam3TrackerPromptEncoderConfig": {"image_size": 112, "patch_size": 14},
    "Sam3ViTConfig": {
        "image_size": 112,
        "patch_size": 14,
        "pretrain_image_size": 56,
        "window_size": 4,
    },
    "Sam3VisionConfig": _MAPS_OF_128,  # four by four times the patches, as of 128 pixels
    "SamHQMaskDecoderConfig": {"vit_dim": 32},
    "SamHQVisionConfig": {
        "global_attn_indexes": [0, 1],
        "output_channels": 32,
        "num_pos_feats": 16,
    },
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
    "Swin2SRConfig": {"depths": [2, 2], "num_heads": [2, 2]},
    "TimesFm2_5Config": {"context_length": 128},
    "Tipsv2DptConfig": {
        "backbone_config": {
            "model_type": "tipsv2_vision_model",
            **_FOUR_STATES,
            "reshape_hidden_states": False,
        }
    },
    "TvpConfig": {"max_img_size": 64, "visual_prompt_size": 8, "num_frames": 2},
    "UVDocConfig": {
        "backbone_config": {
            "model_type": "uvdoc_backbone",
            "out_features": [f"stage{index}" for index in range(1, 7)],
        }
    },
    "VibeVoiceAcousticTokenizerConfig": _CODEC,
    "VibeVoiceAcousticTokenizerEncoderConfig": _CODEC,
    "VitMatteConfig": {
        "fusion_hidden_sizes": [32, 16, 16, 8],
        "backbone_config": {
            "model_type": "vitdet",
            "out_features": ["stage2"],
            "num_channels": 4,
            "patch_size": 16,
        },
    },
    "Xcodec2Config": {"quantization_dim": 64},
    "XmodConfig": {"default_language": "en_XX"},
    "Zamba2Config": _TWO_OF_TWO,
    "ZambaConfig": _TWO_OF_TWO,
    "ZoeDepthConfig": {
        "backbone_config": {"model_type": "beit", **_FOUR_STATES, "reshape_hidden_states": False}
    },
}
"""By the name of a config class: fields it gets whatever the recipe; a dict is for a sub-config."""
