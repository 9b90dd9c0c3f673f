"""What no rule covers: inputs that a family of transformers cannot do without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


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
    count, side = config.num_query_tokens, config.vision_config.image_size
    frames: tuple[int, ...] = ()
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


def _boxed_words(model: Any) -> dict[str, Any]:
    """Words with their places on a page, but not its image: its patches are looked up in a loop."""
    return {"bbox": torch.rand(2, 8, 4), **_masked_pairs(model)}


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


def _documents(model: Any) -> dict[str, Any]:
    """What a retriever found, two documents for each question."""
    return {
        "input_ids": _tokens(2),
        "decoder_input_ids": _tokens(2),
        "context_input_ids": _tokens(4),
        "context_attention_mask": torch.ones(4, 8, dtype=torch.long),
        "doc_scores": torch.randn(2, 2),
        "use_cache": False,
    }


def _actions(model: Any) -> dict[str, Any]:
    """The states and actions after a prefix of text with the patches of one image."""
    config = model.config
    vision = config.vlm_config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    token = config.vlm_config.image_token_id
    return {
        "action_embeds": torch.randn(2, 5, config.dit_config.hidden_size),
        "input_ids": torch.cat([torch.full((2, patches), token), _tokens(2)], dim=1),
        "pixel_values": torch.randn(2, 1, 3, vision.image_size, vision.image_size),
        "attention_mask": torch.ones(2, patches + 8, dtype=torch.long),
        "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
    }


def _speech_twice(model: Any) -> dict[str, Any]:
    """The sound, and twelve frames of its spectrogram."""
    return {"input_values": torch.randn(2, 1, 3840), "input_features": torch.randn(2, 12, 160)}


def _streamed_speech(model: Any) -> dict[str, Any]:
    """As many frames as the tokens they are added to."""
    config = model.config
    frames = 2 * 8 * config.downsample_factor
    return {
        "input_ids": _tokens(2),
        "input_features": torch.randn(2, config.audio_config.num_mel_bins, frames),
        "use_cache": False,
    }


def _one_video(model: Any) -> dict[str, Any]:
    """Its positions of columns do not take more than one."""
    config = model.config
    side = config.max_img_size
    return {
        "input_ids": _tokens(1),
        "pixel_values": torch.randn(1, config.num_frames, 3, side, side),
        "attention_mask": torch.ones(1, 8, dtype=torch.long),
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
    "NeuCodecModel": _speech_twice,
    "OneFormerModel": _images_and_tasks,
    "OmDetTurboForObjectDetection": _classes_and_tasks,
    "DecisionTransformerModel": _decisions,
    "InformerModel": _time_series,
    "JevForDecision": _decision,
    "LongT5Model": _masked_pairs,
    "LxmertModel": _visual_features,
    "MuseGlimmerAssistantModel": _denoising,
    "PerceiverModel": _byte_embeddings,
    "PI0Model": _actions,
    "PPOCRV5MobileDetModel": _images_as_states,
    "PPOCRV5MobileRecModel": _wide_text_line,
    "PPOCRV5ServerRecModel": _wide_text_line,
    "RagModel": _documents,
    "SegGptModel": _prompted_images,
    "SpeechEncoderDecoderModel": _speech_and_text,
    "SwitchTransformersModel": _masked_pairs,
    "TimeSeriesTransformerModel": _time_series,
    "TvpModel": _one_video,
    "UdopModel": _boxed_words,
    "VoxtralRealtimeModel": _streamed_speech,
    "Xcodec2Model": _speech_twice,
}
"""By the name of a model's class: the keyword inputs for it."""
