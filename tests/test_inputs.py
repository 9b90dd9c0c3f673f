"""Inputs that models are given when nobody passes any: the models themselves run on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnres_compile
from attnres_compile.errors import InputError
from attnres_compile.inputs import infer_inputs
from zoo import ALL_CASES, Case, case_ids

TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
SPEECH = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
SPECTROGRAM = {**{k: v for k, v in VISION.items() if k != "image_size"}, "num_mel_bins": 16}


def transformers_model(name: str, config: str, options: dict[str, Any]) -> nn.Module:
    import transformers

    made: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**options))
    return made


def shapes(inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[str, Any]:
    args, kwargs = inputs
    named = {**{str(number): value for number, value in enumerate(args)}, **kwargs}
    return {n: tuple(v.shape) if isinstance(v, Tensor) else v for n, v in named.items()}


def runs(model: nn.Module) -> dict[str, Any]:
    """The shapes of the inferred inputs, on which the model ran."""
    args, kwargs = infer_inputs(model)
    with torch.no_grad():
        model.eval()(*args, **kwargs)
    return shapes((args, kwargs))


LIBRARIES = ("transformers", "torchvision", "timm")


@pytest.mark.parametrize("case", ALL_CASES, ids=case_ids(ALL_CASES))
def test_every_model_of_the_three_libraries_runs_on_inferred_inputs(case: Case) -> None:
    model = case.build()
    if type(model).__module__.split(".")[0] in LIBRARIES:
        assert runs(model)
        return
    try:
        args, kwargs = infer_inputs(model)
    except InputError:
        return  # nothing wrong is inferred, at least
    with torch.no_grad():
        model(*args, **kwargs)


TRANSFORMERS = {
    "text": ("LlamaModel", "LlamaConfig", TEXT, {"input_ids": (2, 8), "use_cache": False}),
    "text encoder": ("RobertaModel", "RobertaConfig", TEXT, {"input_ids": (2, 8)}),
    "classifier": (
        "BertForSequenceClassification",
        "BertConfig",
        TEXT,
        {"input_ids": (2, 8), "use_cache": False},
    ),
    "image": ("BeitModel", "BeitConfig", VISION, {"pixel_values": (2, 3, 32, 32)}),
    "video": (
        "VideoMAEModel",
        "VideoMAEConfig",
        {**VISION, "num_frames": 4},
        {"pixel_values": (2, 4, 3, 32, 32)},
    ),
    "image of two sides": (
        "ASTModel",
        "ASTConfig",
        {**SPECTROGRAM, "max_length": 64},
        {"input_values": (2, 64, 16)},
    ),
    "image and text": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": TEXT, "vision_config": VISION},
        {"input_ids": (2, 8), "pixel_values": (2, 3, 32, 32)},
    ),
    "text with images": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
            "image_token_index": 95,
        },
        {"input_ids": (2, 8)},
    ),
    "sound": (
        "HubertModel",
        "HubertConfig",
        {**TEXT, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
        {"input_values": (2, 4000)},
    ),
    "spectrogram and text": (
        "WhisperModel",
        "WhisperConfig",
        {**SPEECH, "num_mel_bins": 8, "max_source_positions": 8, "pad_token_id": 0},
        {"input_features": (2, 8, 16), "decoder_input_ids": (2, 8)},
    ),
    "features and text": (
        "Speech2TextModel",
        "Speech2TextConfig",
        {**SPEECH, "input_feat_per_channel": 16, "conv_channels": 16},
        {"input_features": (2, 32, 16), "decoder_input_ids": (2, 8)},
    ),
    "encoder alone": (
        "T5EncoderModel",
        "T5Config",
        {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
        {"input_ids": (2, 8)},
    ),
}


@pytest.mark.parametrize(
    ("name", "config", "options", "expected"), TRANSFORMERS.values(), ids=TRANSFORMERS
)
def test_transformers(
    name: str, config: str, options: dict[str, Any], expected: dict[str, Any]
) -> None:
    found = runs(transformers_model(name, config, options))
    assert {key: found[key] for key in expected} == expected
    assert set(found) <= {*expected, "use_cache"}


def test_an_encoder_and_a_decoder_of_different_kinds() -> None:
    import transformers

    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**VISION),
        transformers.GPT2Config(
            vocab_size=96, n_embd=32, n_layer=1, n_head=4, add_cross_attention=True, is_decoder=True
        ),
    )
    assert runs(transformers.VisionEncoderDecoderModel(config)) == {
        "pixel_values": (2, 3, 32, 32),
        "decoder_input_ids": (2, 8),
    }


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make().eval()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_b_16", (2, 3, 224, 224)),
        ("resnet18", (2, 3, 224, 224)),
        ("inception_v3", (2, 3, 224, 224)),
        ("maxvit_t", (2, 3, 224, 224)),
        ("r3d_18", (2, 3, 16, 224, 224)),
        ("mvit_v2_s", (2, 3, 16, 224, 224)),
        ("deeplabv3_mobilenet_v3_large", (2, 3, 224, 224)),
    ],
)
def test_torchvision(name: str, expected: tuple[int, ...]) -> None:
    import torchvision

    none = {"weights": None, **({"weights_backbone": None} if "deeplab" in name else {})}
    model = on_meta(lambda: torchvision.models.get_model(name, **none))
    assert runs(model) == {"0": expected}


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("vit_tiny_patch16_224", {}, (2, 3, 224, 224)),
        ("vit_tiny_patch16_224", {"img_size": 64}, (2, 3, 64, 64)),
        ("vit_tiny_patch16_224", {"img_size": (32, 64), "in_chans": 3}, (2, 3, 32, 64)),
        ("resnet18", {}, (2, 3, 224, 224)),
        ("mixer_s32_224", {}, (2, 3, 224, 224)),
        ("eva02_tiny_patch14_224", {}, (2, 3, 224, 224)),
    ],
)
def test_timm(name: str, options: dict[str, Any], expected: tuple[int, ...]) -> None:
    import timm

    assert runs(on_meta(lambda: timm.create_model(name, **options))) == {"0": expected}


def test_timm_models_made_without_a_pretrained_config() -> None:
    from timm.models.mlp_mixer import MlpMixer
    from timm.models.resnet import BasicBlock, ResNet

    mixer = MlpMixer(img_size=32, in_chans=1, patch_size=8, num_blocks=1, embed_dim=16)
    assert runs(mixer) == {"0": (2, 1, 32, 32)}
    assert runs(ResNet(BasicBlock, [1, 1, 1, 1], in_chans=4)) == {"0": (2, 4, 64, 64)}


class AfterAnother(nn.Module):
    """Does something to its input before the first layer, which then tells nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 8)
        self.values = nn.Linear(5, 8)

    def forward(self, words: Tensor, values: Tensor, scale: float = 1.0) -> Tensor:
        return self.words(words) + self.values(values) * scale


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8)), {"0": (2, 8)}),
        (nn.Sequential(nn.Linear(6, 8)), {"0": (2, 8, 6)}),
        (nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8)), {"0": (2, 8, 6)}),
        (nn.Sequential(nn.RMSNorm(6), nn.Linear(6, 8)), {"0": (2, 8, 6)}),
        (nn.Sequential(nn.Conv1d(4, 8, 3)), {"0": (2, 4, 64)}),
        (nn.Sequential(nn.Conv2d(4, 8, 3)), {"0": (2, 4, 64, 64)}),
        (nn.Sequential(nn.Conv3d(4, 8, 3)), {"0": (2, 4, 64, 64, 64)}),
        (nn.Sequential(nn.BatchNorm2d(4)), {"0": (2, 4, 16, 16)}),
        (nn.Sequential(nn.GroupNorm(2, 4)), {"0": (2, 4, 16, 16)}),
        (TwoInputs(), {"0": (2, 8), "1": (2, 8, 5)}),
    ],
    ids=lambda value: type(value[0] if isinstance(value, nn.Sequential) else value).__name__,
)
def test_modules_whose_first_layers_tell_their_inputs(
    model: nn.Module, expected: dict[str, Any]
) -> None:
    assert runs(model) == expected


def test_inputs_have_the_dtype_and_device_of_the_model() -> None:
    halves = infer_inputs(nn.Sequential(nn.Linear(6, 8)).to(torch.bfloat16))[0][0]
    assert halves.dtype == torch.bfloat16
    meta = infer_inputs(nn.Sequential(nn.Linear(6, 8)).to("meta"))[0][0]
    assert meta.device.type == "meta"
    words = infer_inputs(nn.Sequential(nn.Embedding(50, 8)).to(torch.bfloat16))[0][0]
    assert words.dtype == torch.int64
    assert int(words.max()) < 50


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    "make",
    [
        AfterAnother,
        Branching,
        lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True),
        lambda: transformers_model(
            "TimeSeriesTransformerModel",
            "TimeSeriesTransformerConfig",
            {"prediction_length": 4, "context_length": 8, "d_model": 32},
        ),
        lambda: transformers_model("LlamaModel", "LlamaConfig", TEXT).layers[0],
    ],
    ids=["nothing told", "not traceable", "nn.Transformer", "unknown input", "layer"],
)
def test_what_cannot_be_inferred_is_asked_for(make: Callable[[], nn.Module]) -> None:
    model = make()
    with pytest.raises(InputError) as raised:
        attnres_compile.plan(model)
    assert str(raised.value) == (
        f"the inputs of {type(model).__name__} cannot be inferred; pass example inputs, as in "
        "convert(model, args=(x,)) or convert(model, kwargs={'input_ids': ids})."
    )


def test_planning_draws_no_random_numbers() -> None:
    model = transformers_model("LlamaModel", "LlamaConfig", TEXT)
    state = torch.get_rng_state()
    attnres_compile.plan(model)
    assert torch.equal(torch.get_rng_state(), state)
