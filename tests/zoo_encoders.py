"""Encoders, encoder-decoders and vision models of the transformers library."""

from __future__ import annotations

import torch

from zoo_case import Inputs, tokens
from zoo_transformers import SMALL, token_model, vision


def t5_inputs() -> Inputs:
    return (), {"input_ids": tokens(length=9), "decoder_input_ids": tokens(length=5)}


def whisper_inputs() -> Inputs:
    # The second convolution halves the length, and the encoder insists on its 8 positions.
    return (), {"input_features": torch.randn(2, 8, 16), "decoder_input_ids": tokens(length=5)}


T5 = token_model(
    "t5",
    "T5ForConditionalGeneration",
    "T5Config",
    {
        "vocab_size": 96,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 3,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    },
    depths=(6, 6),
    make_inputs=t5_inputs,
    counted_in="T5LayerSelfAttention, T5LayerCrossAttention, T5LayerFF: one each; "
    "3 encoder layers of 2, 2 decoder layers of 3",
)
WHISPER = token_model(
    "whisper",
    "WhisperForConditionalGeneration",
    "WhisperConfig",
    {
        "vocab_size": 96,
        "num_mel_bins": 8,
        "d_model": 32,
        "encoder_layers": 3,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_source_positions": 8,
        "max_target_positions": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    },
    depths=(6, 6),
    make_inputs=whisper_inputs,
    counted_in="WhisperEncoderLayer.forward: 2, 3 layers; WhisperDecoderLayer.forward: 3, 2 layers",
)
VIT = vision(
    "vit",
    "ViTModel",
    "ViTConfig",
    {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    },
    depths=(6,),
    counted_in="ViTLayer.forward: 2 x `hidden_states + residual`, 3 layers",
)
DINOV2 = vision(
    "dinov2",
    "Dinov2Model",
    "Dinov2Config",
    {
        "hidden_size": 32,
        "mlp_ratio": 2,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    },
    depths=(6,),
    counted_in="Dinov2Layer.forward: 2 x `drop_path(hidden_states) + residual`, 3 layers",
)
SWIN = vision(
    "swin",
    "SwinModel",
    "SwinConfig",
    {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
    },
    depths=(4, 4),
    counted_in="SwinLayer.forward: 2, stages of 2 layers; patch merging ends a stream",
)
CONVNEXT = vision(
    "convnext",
    "ConvNextModel",
    "ConvNextConfig",
    {"hidden_sizes": [8, 16, 24, 32], "depths": [2, 2, 3, 2], "image_size": 64, "patch_size": 2},
    depths=(2, 2, 3, 2),
    channel_dim=1,
    counted_in="ConvNextLayer.forward: 1, stages of 2, 2, 3, 2 layers",
)
BERT = token_model(
    "bert",
    "BertModel",
    "BertConfig",
    {**SMALL, "num_hidden_layers": 2},
    depths=(),
    has_cache=False,
    refused="post-norm",
    counted_in="BertSelfOutput, BertOutput: LayerNorm(hidden_states + input_tensor)",
)

ENCODER_CASES = (
    T5,
    WHISPER,
    VIT,
    DINOV2,
    SWIN,
    CONVNEXT,
)
ENCODER_REFUSED = (BERT,)
