"""The zoo itself: its models run and its counts hold, shown without the package under test."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from zoo import (
    ALL_CASES,
    CASES,
    EXTRA_CASES,
    EXTRA_REFUSED,
    REFUSED,
    Case,
    case_ids,
    float_outputs,
    to_float64,
)
from zoo_trace import trace_streams

CONVERTED = (*CASES, *EXTRA_CASES)
ALL_REFUSED = (*REFUSED, *EXTRA_REFUSED)

# Values, unlike code, show neither a dropout that is off nor that a model mixes depths already.
INVISIBLE_IN_VALUES = {"dropout_on_the_carrier", "inkling2"}

# How many residual additions one call of a module makes in its own forward, read in its source.
PER_MODULE: dict[str, int | Callable[[nn.Module], int]] = {
    "LlamaDecoderLayer": 2,
    "Qwen3DecoderLayer": 2,
    "MixtralDecoderLayer": 2,
    "Gemma3DecoderLayer": 2,
    "GPT2Block": 2,
    "GPTNeoXLayer": lambda layer: 1 if layer.use_parallel_residual else 2,
    "FalconDecoderLayer": lambda layer: 1 if layer.config.parallel_attn else 2,
    "OPTDecoderLayer": 2,
    "BloomAttention": 1,
    "BloomMLP": 1,
    "GraniteDecoderLayer": 2,
    "KimiLinearDecoderLayer": 2,
    "MambaBlock": 1,
    "T5LayerSelfAttention": 1,
    "T5LayerCrossAttention": 1,
    "T5LayerFF": 1,
    "WhisperEncoderLayer": 2,
    "WhisperDecoderLayer": 3,
    "ViTLayer": 2,
    "Dinov2Layer": 2,
    "SwinLayer": 2,
    "ConvNextLayer": 1,
    "TransformerEncoderLayer": 2,
    "TransformerDecoderLayer": 3,
    "EncoderBlock": 2,
    "CNBlock": 1,
    "SwinTransformerBlock": 2,
    # torchvision's and timm's class of this name
    "InvertedResidual": lambda block: (
        int(getattr(block, "use_res_connect", False)) + int(getattr(block, "has_skip", False))
    ),
    "DepthwiseSeparableConv": lambda block: int(block.has_skip),
    "Block": 2,
    "EvaBlock": 2,
    "MixerBlock": 2,
    "GPTBlock": 2,
    "DiTBlock": 2,
    "PreActivationBlock": lambda block: int(block.projection is None),
    "ParallelBlock": 2,
    "RightSkipBlock": 2,
    "AlphaBlock": 3,
    "LoRABlock": 2,
    "FourierBlock": 2,
    "ShiftBlock": 2,
    "PoolingBlock": 2,
    "InPlaceBlock": 2,
    "PhiDecoderLayer": 1,
    "GPTJBlock": 1,
    "CohereDecoderLayer": 2,
    "StableLmDecoderLayer": 2,
    "Olmo2DecoderLayer": 2,
    "Gemma2DecoderLayer": 2,
    "GptOssDecoderLayer": 2,
    "Qwen3MoeDecoderLayer": 2,
    "Qwen3NextDecoderLayer": 2,
    "DeepseekV3DecoderLayer": 2,
    "Lfm2DecoderLayer": 2,
    "Mamba2Block": 1,
    "RwkvBlock": 2,
    "ModernBertEncoderLayer": 2,
    "PegasusEncoderLayer": 2,
    "PegasusDecoderLayer": 3,
    "CLIPEncoderLayer": 2,
    "Swinv2Layer": 2,
    "SegformerLayer": 2,
    "PoolFormerLayer": 2,
    "ParallelThingsBlock": 2,
    "LayerScaleBlock": 2,
    "LayerScaleBlockClassAttn": 2,
    "ResBlock": 2,
    "NormFreeBlock": lambda block: int(block.downsample is None),
    "ResidualGroup": lambda group: 1 + len(group.blocks),
    # its block, found once, is called `loops` times
    "Looped": lambda module: 2 * (module.loops - 1),
    "PositionedBlock": 2,
    "ReZeroBlock": 2,
    "JointBlock": 4,
}

# Parameters whose gradient is zero in exact arithmetic, or that this forward pass does not use.
NO_GRADIENT = (
    "k_proj.bias",  # softmax over keys is blind to what is added to all of them
    "attn.k.bias",
    "attn.proj_l.bias",
    "mlp_tokens.fc2.bias",  # one number for all channels of a token: layer norm removes it
    "embed_positions.weight",  # frozen
    "mask_token",
)


def is_constant_for_pooling(case: Case, parameter: str) -> bool:
    """A pooling mixer subtracts what it pools, and with it any constant."""
    return case.name in {"pooling_mixer", "poolformer"} and parameter.endswith(
        ("norm_1.bias", "before_norm.bias")
    )


def test_names_are_unique() -> None:
    names = case_ids(ALL_CASES)
    assert len(names) == len(set(names))


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_table_is_consistent(case: Case) -> None:
    assert sum(case.depths) == case.residual_additions
    assert len(case.depths) == len(case.sublayers) == case.streams
    assert all(1 < runs <= depth for depth, runs in zip(case.depths, case.sublayers, strict=True))
    assert bool(case.depths) != bool(case.refused)
    assert case.counted_in


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_builds_and_runs_the_same_each_time(case: Case) -> None:
    model, again = case.build(), case.build()
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for (name, tensor), other in zip(
        model.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, other), name

    with torch.no_grad():
        first, second = ([*float_outputs(run(case, m))] for m in (model, again))
    assert first
    for left, right in zip(first, second, strict=True):
        assert left.isfinite().all()
        assert torch.equal(left, right)


@pytest.mark.parametrize("case", CONVERTED, ids=str)
def test_runs_in_double_precision(case: Case) -> None:
    model = case.build()
    expected = float_outputs(run(case, model))
    args, kwargs = to_float64(case.inputs())
    outputs = float_outputs(to_float64(model)(*args, **kwargs))
    for output, reference in zip(outputs, expected, strict=True):
        assert output.dtype == torch.float64 or case.float64_tolerance > 1e-10
        torch.testing.assert_close(output.float(), reference, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", CONVERTED, ids=str)
def test_no_part_of_a_model_is_dead(case: Case) -> None:
    """A branch without influence would let a wrong conversion pass."""
    model = case.build()
    outputs = float_outputs(run(case, model))
    sum((output * torch.randn_like(output)).sum() for output in outputs).backward()
    dead = [
        name
        for name, parameter in model.named_parameters()
        if (parameter.grad is None or parameter.grad.abs().max() < 1e-5)
        and not name.endswith(NO_GRADIENT)
        and not is_constant_for_pooling(case, name)
    ]
    assert not dead


@pytest.mark.parametrize("case", CONVERTED, ids=str)
def test_count_follows_from_the_modules(case: Case) -> None:
    count = 0
    for module in case.build().modules():
        additions = PER_MODULE.get(type(module).__name__, 0)
        count += additions if isinstance(additions, int) else additions(module)
    assert count == case.residual_additions + case.too_short


@pytest.mark.parametrize("case", CONVERTED, ids=str)
def test_count_follows_from_the_values(case: Case) -> None:
    args, kwargs = case.inputs()
    streams = trace_streams(case.build(), args, kwargs)
    long = [stream for stream in streams if stream.sublayers > 1]
    assert tuple(stream.depth for stream in long) == case.depths
    assert tuple(stream.sublayers for stream in long) == case.sublayers
    if case.name != "kimi_linear":
        # its triangular solve, in plain PyTorch, has 63 rows that look like short streams
        assert len(streams) - len(long) == case.too_short


@pytest.mark.parametrize("case", ALL_REFUSED, ids=str)
def test_no_stream_in_what_is_refused(case: Case) -> None:
    args, kwargs = case.inputs()
    streams = trace_streams(case.build(), args, kwargs)
    if case.name not in INVISIBLE_IN_VALUES:
        assert all(stream.sublayers == 1 for stream in streams)
        assert bool(streams) != (case.refused in {"no residual addition", "scale"})


@pytest.mark.parametrize("case", [case for case in CASES if case.has_cache], ids=str)
def test_cache_is_returned_on_request(case: Case) -> None:
    model = case.build()
    args, kwargs = case.inputs(use_cache=True)
    output = model(*args, **kwargs)
    assert any("cache" in name or "past_key_values" in name for name in output)
    assert len(float_outputs(output)) > len(float_outputs(run(case, model)))


def run(case: Case, model: nn.Module) -> object:
    args, kwargs = case.inputs()
    return model(*args, **kwargs)
