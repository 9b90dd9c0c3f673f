"""Example inputs for models that say themselves what they take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from attnres_compile.errors import InputError

_BATCH, _LENGTH = 2, 8
_IMAGE = 64  # pixels a side, for convolutional models that take any size
_TRAINED, _FRAMES = 224, 16  # pixels a side, frames: what torchvision's models were trained on


def infer_inputs(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs for one call of a model, on its device.

    Known: transformers (from the config), timm (``pretrained_cfg``), torchvision (``image_size``
    or 224 pixels), and modules whose first layers tell their input (FX-traceable ones).

    Raises:
        InputError: nothing is known of the model; says what to pass.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for infer in (_transformers_inputs, _timm_inputs, _torchvision_inputs, _traced_inputs):
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
            inputs = infer(model)
        if inputs is None:
            continue
        args, kwargs = inputs
        placed = [_placed(value, device, dtype) for value in args]
        return tuple(placed), {name: _placed(v, device, dtype) for name, v in kwargs.items()}
    raise InputError(
        f"the inputs of {type(model).__name__} cannot be inferred; pass example inputs, as in "
        "convert(model, args=(x,)) or convert(model, kwargs={'input_ids': ids})."
    )


def _placed(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else value.dtype)


Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def _transformers_inputs(model: nn.Module) -> Inputs | None:
    if not any(c.__module__.startswith("transformers.") for c in type(model).__mro__):
        return None
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is None or main is None:
        return None
    value = _transformers_input(main, config)
    if value is None:
        return None
    kwargs: dict[str, Any] = {main: value}
    if main == "input_ids" and hasattr(model, "text_model") and hasattr(model, "vision_model"):
        kwargs["pixel_values"] = _images(config)  # CLIP and its like compare both
    if getattr(config, "is_encoder_decoder", False):
        if hasattr(model, "get_decoder") and _token_ids(config) is not None:
            kwargs["decoder_input_ids"] = _token_ids(config)
    elif hasattr(config, "use_cache"):
        kwargs["use_cache"] = False
    return (), kwargs


def _transformers_input(name: str, config: Any) -> Tensor | None:
    if name == "pixel_values":
        return _images(config)
    if name == "input_features":
        if hasattr(config, "input_feat_per_channel"):
            return torch.randn(_BATCH, 32, config.input_feat_per_channel)
        frames = 2 * getattr(config, "max_source_positions", 50)
        return torch.randn(_BATCH, getattr(config, "num_mel_bins", 80), frames)
    if name == "input_values":
        if hasattr(config, "num_mel_bins"):
            return torch.randn(_BATCH, config.max_length, config.num_mel_bins)
        channels = [config.audio_channels] if hasattr(config, "audio_channels") else []
        return torch.randn(_BATCH, *channels, 4000)
    return _token_ids(config) if name == "input_ids" else None


def _images(config: Any) -> Tensor:
    """Images, or videos where the config counts frames; of a composite config, its image part's."""
    parts = [getattr(config, part, None) for part in ("vision_config", "encoder")]
    config = next((c for c in (config, *parts) if hasattr(c, "image_size")), config)
    frames = [config.num_frames] if hasattr(config, "num_frames") else []
    size = _side(getattr(config, "image_size", _IMAGE))
    return torch.randn(_BATCH, *frames, getattr(config, "num_channels", 3), *size)


def _token_ids(config: Any) -> Tensor | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    words = getattr(text, "vocab_size", None)
    return None if words is None else torch.randint(0, int(words), (_BATCH, _LENGTH))


def _side(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _timm_inputs(model: nn.Module) -> Inputs | None:
    if not type(model).__module__.startswith("timm."):
        return None
    configured = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    channels, *size = configured.get("input_size", (_image_channels(model), _IMAGE, _IMAGE))
    told = (getattr(module, "img_size", None) for module in model.modules())
    size = next((list(_side(side)) for side in told if side), size)
    return (torch.randn(_BATCH, channels, *size),), {}


def _image_channels(model: nn.Module) -> int:
    convolutions = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    return next((convolution.in_channels for convolution in convolutions), 3)


def _torchvision_inputs(model: nn.Module) -> Inputs | None:
    if not type(model).__module__.startswith("torchvision.models"):
        return None
    size = _side(getattr(model, "image_size", _TRAINED))
    frames = [_FRAMES] if ".video." in type(model).__module__ else []
    images = torch.randn(_BATCH, 3, *frames, *size)
    return (images, images) if type(model).__name__ == "RAFT" else (images,), {}


def _traced_inputs(model: nn.Module) -> Inputs | None:
    """Shapes read off the first layer that each input of a traceable module goes into."""
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception:  # not traceable: then nothing is known, and the caller says so
        return None
    values = []
    for node in graph.nodes:
        if node.op != "placeholder" or node.args:
            continue
        value = _value_for(model, node)
        if value is None:
            return None
        values.append(value)
    return (tuple(values), {}) if values else None


def _value_for(model: nn.Module, placeholder: fx.Node) -> Tensor | None:
    for user in placeholder.users:
        if user.op != "call_module":
            continue
        layer = model.get_submodule(str(user.target))
        if isinstance(layer, nn.Embedding):
            return torch.randint(0, layer.num_embeddings, (_BATCH, _LENGTH))
        if isinstance(layer, nn.Linear):
            return torch.randn(_BATCH, _LENGTH, layer.in_features)
        if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
            return torch.randn(_BATCH, _LENGTH, *layer.normalized_shape)
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return torch.randn(_BATCH, layer.in_channels, *[_IMAGE] * len(layer.kernel_size))
        if isinstance(layer, nn.BatchNorm2d):
            return torch.randn(_BATCH, layer.num_features, _IMAGE // 4, _IMAGE // 4)
        if isinstance(layer, nn.GroupNorm):
            return torch.randn(_BATCH, layer.num_channels, _IMAGE // 4, _IMAGE // 4)
    return None
