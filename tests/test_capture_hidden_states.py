"""Models that ask an inner one for its hidden states, captured, converted and run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import attnres_compile
from tolerances import relative_error
from zoo_conversion import randomize


def llava() -> tuple[nn.Module, dict[str, Any]]:
    small = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            **small, num_hidden_layers=3, image_size=16, patch_size=8
        ),
        text_config=transformers.LlamaConfig(**small, num_hidden_layers=2, vocab_size=64),
        image_token_index=5,
    )
    ids = torch.randint(6, 60, (2, 9))
    ids[:, 1:5] = 5
    images = torch.randn(2, 3, 16, 16)
    model: nn.Module = transformers.LlavaForConditionalGeneration(config)
    return model, {"input_ids": ids, "pixel_values": images, "use_cache": False}


def depth_estimator() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.DPTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
    )
    return transformers.DPTForDepthEstimation(config), {"pixel_values": torch.randn(2, 3, 32, 32)}


@pytest.mark.parametrize(("make", "additions"), [(llava, [6, 4]), (depth_estimator, [8, 2, 2, 2])])
def test_a_model_that_asks_an_inner_one_for_its_hidden_states(
    make: Any, additions: list[int]
) -> None:
    """transformers installs its hooks at the first such call, in a way that cannot be traced."""
    model, inputs = make()
    model = model.double().eval()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    copied = copy.deepcopy(model)  # the library records twice where two models share layers
    converted = attnres_compile.convert(copied, kwargs=inputs)
    assert [len(stream.additions) for stream in converted.plan.streams] == additions
    assert not any(module._forward_hooks for module in copied.modules())
    name = "logits" if make is llava else "predicted_depth"
    for _ in range(2):
        assert relative_error(converted(**inputs)[name], model(**inputs)[name]) < 1e-10
    randomize(converted)
    assert relative_error(converted(**inputs)[name], model(**inputs)[name]) > 1e-6
