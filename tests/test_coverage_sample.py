"""A fixed sample of the sweep over model libraries: what is found in each model."""

from __future__ import annotations

import pytest

import check_model

# Library, name, residual additions of each stream (none: refused), and the kinds of refusals. Of
# two layers, a pre-norm transformer has 2 x 2 additions, T5's decoder 2 x 3, Falcon and Mamba one
# per layer; a Conformer's layer ends with a norm, so that each is a stream of four.
SAMPLE: tuple[tuple[str, str, tuple[int, ...], str], ...] = (
    *(
        ("transformers", name, (4,), "")
        for name in (
            "LlamaModel GPT2Model ViTModel GPTBigCodeModel ImageGPTModel LlavaModel GemmaModel "
            "FlintModel EvollaModel GptOssModel LightOnOcrModel Lfm2VlModel GlmAsrModel "
            "GraniteSpeechPlusModel BioGptModel"
        ).split()
    ),
    ("transformers", "FalconModel", (2,), ""),
    ("transformers", "Mamba2Model", (2,), ""),
    ("transformers", "ParakeetForCTC", (4, 4), ""),
    ("transformers", "CLIPModel", (4, 4), ""),
    ("transformers", "Owlv2Model", (4, 4), ""),
    ("transformers", "T5Model", (4, 6), ""),
    ("transformers", "AltCLIPModel", (4,), "post-norm"),
    *(
        ("transformers", name, (), "post-norm")
        for name in (
            "BertModel GteModel GitModel JinaEmbeddingsV3Model ErnieModel MiniMaxModel "
            "DebertaV2Model OpenAIGPTModel NystromformerModel ConvBertModel"
        ).split()
    ),
    ("transformers", "HiggsAudioV2Model", (), "rearranged-carrier single-sublayer"),
    # convnext_atto has stages of 2, 2, 6 and 2 blocks, of which two stay
    ("timm", "convnext", (2, 2, 2, 2), ""),
    ("torchvision", "resnet18", (), "post-activation"),
    ("torchvision", "regnet_y_400mf", (), "post-activation"),
    ("torchvision", "alexnet", (), ""),
    ("torchvision", "squeezenet1_0", (), ""),
    ("torchvision", "squeezenet1_1", (), ""),
    ("torchvision", "shufflenet_v2_x0_5", (), ""),
)


def test_the_sample_has_forty_models() -> None:
    assert len({(library, name) for library, name, _, _ in SAMPLE}) == len(SAMPLE) == 40


# Long ones, of which others are of the same kind: decoders, encoders of images, and both together.
LONG = set(
    "GPT2Model GPTBigCodeModel ImageGPTModel LlavaModel GlmAsrModel GraniteSpeechPlusModel "
    "FlintModel FalconModel Owlv2Model CLIPModel".split()
)


@pytest.mark.parametrize(
    ("library", "name", "additions", "kinds"),
    [
        pytest.param(*each, id=each[1], marks=[pytest.mark.slow] if each[1] in LONG else [])
        for each in SAMPLE
    ],
)
def test_the_sample(library: str, name: str, additions: tuple[int, ...], kinds: str) -> None:
    result = check_model.check(library, name)
    assert result.status == ("converted" if additions else "refused"), result.detail
    assert (result.streams, result.additions) == (len(additions), sum(additions))
    assert sorted(result.refusals) == sorted(kinds.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "additions"), [("mobilenet_v2", (2, 2, 2, 2)), ("efficientnet_b0", (2, 2, 2))]
)
def test_stages(name: str, additions: tuple[int, ...]) -> None:
    """MobileNetV2 has 1, 2, 3, 4, 3, 3 and 1 blocks a stage, EfficientNet-B0 1, 2, 2, 3, 3, 4, 1.

    The first block of each has no skip, of the equal ones after it two stay, and a stage with one
    skip is refused.
    """
    test_the_sample("torchvision", name, additions, "single-sublayer")
