"""Every model of the zoo, converted: counts, losslessness, learning, stripping, refusals.

The numbers that plans are held against were counted by hand, in the models' sources.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import fx, nn

import attnres_compile
from attnres_compile import rewriting
from attnres_compile.capture import capture
from attnres_compile.config import AttnResConfig
from attnres_compile.errors import NothingToConvertError
from attnres_compile.passes.rewrite_residuals import rewrite_residuals
from attnres_compile.planning import plan_of_capture
from zoo import CASES, EXTRA_CASES, EXTRA_REFUSED, REFUSED, Case, by_name
from zoo_conversion import (
    Conversion,
    assert_everything_learns,
    assert_lossless,
    assert_same_state,
    convert_case,
    new_names,
    randomize,
    run,
    shared_tensors,
    sites_of,
)

# Of the further families, those that test what none of the others does.
QUICK_EXTRAS = {
    "cohere",  # two additions per sublayer
    "olmo2",  # readers without a norm
    "swinv2",
    "timm_cait",  # a second stream on the class token
    "timm_resmlp",  # no norm, and tokens mixed by a linear layer
    "nested_groups",
    "looped",  # one module, called several times
    "mid_chain_addition",
    "all_states",
    "in_place_alias",
    "joint_streams",
}
# Long ones, of kinds of which others are converted each time.
LONG = {"kimi_linear", "mamba", "gemma3", "torchvision_mobilenet_v2", "bloom", "opt"}
# Parallel branches, which gpt_neox has, and other orders of its layers and of falcon's.
LONG |= {"falcon", "gpt_neox_sequential", "falcon_sequential", "falcon_new_decoder_architecture"}
# What vit, convnext, swinv2, t5 and llama are by other names, in other libraries or with details
# that concern no addition.
LONG |= {"timm_vit", "dinov2", "timm_eva02", "torchvision_convnext", "swin", "torchvision_swin"}
LONG |= {"whisper", "qwen3", "mixtral"}
# One of each layout; in float32, which tells less, all of them are compared.
IN_DOUBLE = {"llama", "convnext", "preact_resnet"}


def slow_if(condition: bool) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if condition else []


CONVERTED = [
    pytest.param(
        case,
        id=case.name,
        marks=slow_if(case.name in LONG or (case in EXTRA_CASES and case.name not in QUICK_EXTRAS)),
    )
    for case in (*CASES, *EXTRA_CASES)
]
IN_DOUBLE_PRECISION = [
    pytest.param(case, id=case.name, marks=slow_if(case.name not in IN_DOUBLE))
    for case in (*CASES, *EXTRA_CASES)
]
# Rows of kimi_linear's triangular solve, 63 in each of its two linear layers: x + f(x), once.
SINGLE_ROWS = {"kimi_linear": 126}

# The skip around the selective scan in each of four layers, `scan(x) + D * x` with a learned D.
SCALED_SKIPS = {"mamba": 4}

# What linear attention remembers from token to token, `state * decay + update`.
GATED_SKIPS = {"kimi_linear": 2, "qwen3_next": 1}

# How many readers are norms, and how many are not, read in the models' sources.
READERS = {
    "llama": (9, 0),  # 2 per layer and the final one, 4 layers, in decomposed form
    "gpt2": (9, 0),
    "granite": (9, 0),
    "t5": (14, 0),  # 2 per encoder layer, 3 per decoder layer, 2 final ones
    "vit": (7, 0),
    "mamba": (5, 0),
    # A convolution per block and a norm in each of 3 downsamplings; at the end the output, and a
    # norm behind the pooling.
    "convnext": (4, 10),
    "torchvision_convnext": (3, 7),  # a block of 7 and 2 downsamplings; norm behind the pooling
    "preact_resnet": (0, 7),  # batch norm: 3 + 1 in the first stage, 2 + 1 in the second
    # Queries, keys, values, gate and up-projection read the state itself, 4 layers; a final norm.
    "olmo2": (1, 20),
    # The windows' padding and the MLP per layer; patch merging by slices; a final norm.
    "swinv2": (1, 9),
    "in_place": (4, 3),  # batch norm of half the state, group norm, 3 blocks; a final norm
    "shift_mixer": (4, 3),
}


@pytest.mark.parametrize("case", CONVERTED)
def test_conversion(case: Case) -> None:
    conversion = convert_case(case)
    check_counts(case, conversion)
    check_sites_in_an_export(case, conversion)

    expected = run(conversion.copied, conversion.inputs)
    assert_lossless(run(conversion.converted, conversion.inputs), expected, conversion.tolerance)
    check_stripping(conversion)

    randomize(conversion.converted)
    learning = run(conversion.converted, conversion.inputs)
    assert_everything_learns(learning, expected, new_names(conversion.plan))
    check_original(conversion)


@pytest.mark.parametrize("case", IN_DOUBLE_PRECISION)
def test_losslessness_in_double_precision(case: Case) -> None:
    conversion = convert_case(case, torch.float64)
    expected = run(conversion.copied, conversion.inputs)
    assert_lossless(run(conversion.converted, conversion.inputs), expected, conversion.tolerance)


def check_counts(case: Case, conversion: Conversion) -> None:
    """Plan and parameters agree with what a person counts in the model's source."""
    plan = conversion.plan
    assert plan.num_residual_additions == case.residual_additions
    assert tuple(len(stream.additions) for stream in plan.streams) == case.depths
    assert tuple(len(stream.sublayers) for stream in plan.streams) == case.sublayers
    assert {stream.channel_dim for stream in plan.streams} == {case.channel_dim}
    too_short = case.too_short + SINGLE_ROWS.get(case.name, 0)
    scaled = SCALED_SKIPS.get(case.name, 0)
    kinds = ["single-sublayer"] * too_short + ["scaled-carrier"] * scaled
    kinds += ["gated-skip"] * GATED_SKIPS.get(case.name, 0)
    assert [refusal.kind for refusal in plan.refusals] == kinds
    names = [name for name, _ in conversion.converted.named_parameters()]
    original = [name for name, _ in conversion.model.named_parameters()]
    assert set(names) == {*original, *new_names(plan)}
    assert len(names) == len(original) + len(new_names(plan))
    if case.name in READERS:
        readers = [r for s in plan.streams for site in s.sites for r in site.readers]
        norms = sum(reader.scale_invariant for reader in readers)
        assert (norms, len(readers) - norms) == READERS[case.name]


def check_sites_in_an_export(case: Case, conversion: Conversion) -> None:
    """Dynamo and torch.export lead to the same sites, blocks and classes of readers."""
    args, kwargs = conversion.inputs
    exported = capture(conversion.model, args, kwargs, route="export")
    plan = plan_of_capture(exported, conversion.model, AttnResConfig())
    assert sites_of(plan) == sites_of(conversion.plan)
    # Some models choose another form of a scan in an export.
    kinds = {refusal.kind for refusal in (*plan.refusals, *conversion.plan.refusals)}
    allowed = {"single-sublayer"}
    allowed |= {"scaled-carrier"} if case.name in SCALED_SKIPS else set()
    allowed |= {"gated-skip"} if case.name in GATED_SKIPS else set()
    assert kinds <= allowed


def check_stripping(conversion: Conversion) -> None:
    stripped = attnres_compile.strip(conversion.converted)
    assert_same_state(stripped, conversion.copied)
    assert shared_tensors(stripped) == shared_tensors(conversion.copied)
    for name, parameter in stripped.named_parameters():
        assert parameter is conversion.model.get_parameter(name), name


def check_original(conversion: Conversion) -> None:
    """Converting, running and stripping have left the model as it was."""
    assert_same_state(conversion.model, conversion.copied)
    after = run(conversion.model, conversion.inputs)
    before = run(conversion.copied, conversion.inputs)
    for left, right in zip(after.outputs, before.outputs, strict=True):
        assert torch.equal(left, right)


TRAINED = [
    "gpt2",
    "t5",
    "preact_resnet",
    "nanogpt_targets",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("swin", "torchvision_convnext")),
]


@pytest.mark.parametrize("name", TRAINED)
def test_losslessness_in_training(name: str) -> None:
    """Dropout draws the same masks, and batch norm keeps the same statistics."""
    conversion = convert_case(by_name(name))
    evaluated = run(conversion.copied, conversion.inputs)
    for model in (conversion.copied, conversion.converted):
        model.train()
    expected = run(conversion.copied, conversion.inputs)
    assert_lossless(run(conversion.converted, conversion.inputs), expected, conversion.tolerance)
    with pytest.raises(AssertionError):
        assert_lossless(expected, evaluated, conversion.tolerance)
    buffers = dict(conversion.converted.named_buffers())
    for buffer_name, buffer in conversion.copied.named_buffers():
        torch.testing.assert_close(buffers[buffer_name], buffer)


# Negative twins: a conversion with one mistake does not pass.


def wrong_source(mix: Any) -> list[fx.Node]:
    return [*mix.args[0][:-1], mix.args[0][0]]


def missing_source(mix: Any) -> list[fx.Node]:
    return list(mix.args[0][:-1])


def detached_source(mix: Any) -> list[fx.Node]:
    with mix.graph.inserting_before(mix):
        detached = mix.graph.call_function(torch.ops.aten.detach.default, (mix.args[0][0],))
    return [detached, *mix.args[0][1:]]


@pytest.mark.parametrize("mistake", [wrong_source, missing_source, detached_source])
@pytest.mark.parametrize("name", ["nanogpt", "preact_resnet"])
def test_one_wrong_source_is_noticed(
    name: str, mistake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(graph: fx.Graph, *rest: Any) -> None:
        rewrite_residuals(graph, *rest)
        mixes = [node for node in graph.nodes if node.target is torch.ops.attnres.mix.default]
        mixes[-1].args = (mistake(mixes[-1]), *mixes[-1].args[1:])

    conversion = convert_case(by_name(name))
    expected = run(conversion.copied, conversion.inputs)
    monkeypatch.setattr(rewriting, "rewrite_residuals", wrong)
    actual = run(conversion.converted, conversion.inputs)
    part = "gradient" if mistake is detached_source else "output"
    with pytest.raises(AssertionError, match=part):
        assert_lossless(actual, expected, conversion.tolerance)


def test_zero_queries_do_not_pass_for_random_ones() -> None:
    conversion = convert_case(by_name("nanogpt"))
    expected = run(conversion.copied, conversion.inputs)
    actual = run(conversion.converted, conversion.inputs)
    with pytest.raises(AssertionError):
        assert_everything_learns(actual, expected, new_names(conversion.plan))


def test_a_changed_or_untied_weight_is_no_same_state() -> None:
    model = by_name("nanogpt").build()
    changed, untied = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        changed.get_parameter("blocks.0.norm_1.bias")[0] += 1e-6
    weight = model.get_parameter("head.weight")
    untied.get_submodule("head").weight = nn.Parameter(weight.detach().clone())
    for other in (changed, untied):
        with pytest.raises(AssertionError):
            assert_same_state(other, model)


# What is refused, and why.


@pytest.mark.parametrize("case", [*REFUSED, *EXTRA_REFUSED], ids=str)
def test_refusal(case: Case) -> None:
    model = case.build()
    copied = copy.deepcopy(model)
    args, kwargs = case.inputs()
    plan = attnres_compile.plan(model, args, kwargs)
    assert plan.streams == ()
    assert all(case.refused in refusal.reason for refusal in plan.refusals)
    assert bool(plan.refusals) != (case.refused == "no residual addition")

    with pytest.raises(NothingToConvertError, match=case.refused) as caught:
        attnres_compile.convert(model, args, kwargs)
    message = str(caught.value)
    assert type(model).__name__ in message
    for refusal in plan.refusals[:1]:
        assert refusal.module_path
        # Dynamo names no line of what PyTorch's own layers compute.
        in_pytorch = type(model).__module__.startswith("torch.")
        assert (".py:" in refusal.source) != in_pytorch
        assert ", ".join(filter(None, (refusal.module_path, refusal.source))) in message
    assert_same_state(model, copied)
