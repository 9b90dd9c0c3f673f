"""Converted models compute the paper's formula: with random queries and gains, outputs and all
gradients equal those of a Block AttnRes forward pass written by hand (``oracles.py``).
"""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import attnres_compile
from attnres_compile import AttnResConfig
from oracle_cases import (
    CASES,
    OracleCase,
    gradient_of,
    loss_of,
    output_error,
    random_sites,
    run_oracle,
)
from oracle_mixer import Aggregate, Mixing, SiteKey, SiteParameters

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}
LLAMA, *_, T5, RESNET = CASES


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"num_blocks": 1}, id="1", marks=pytest.mark.slow),
        pytest.param({"num_blocks": 3}, id="3"),
        pytest.param({"num_blocks": 8}, id="8", marks=pytest.mark.slow),
        pytest.param({"block_sublayers": 1}, id="full", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("aggregate", "dtype"),
    [
        # float64 tells most, and the mean differs by one factor: each of the others takes as long
        pytest.param("sum", torch.float64, id="float64-sum"),
        pytest.param("mean", torch.float64, id="float64-mean", marks=pytest.mark.slow),
        pytest.param("sum", torch.float32, id="float32-sum", marks=pytest.mark.slow),
        pytest.param("mean", torch.float32, id="float32-mean", marks=pytest.mark.slow),
    ],
)
def test_random_queries_equal_the_oracle(
    case: OracleCase, layout: dict[str, int], aggregate: Aggregate, dtype: torch.dtype
) -> None:
    compare_with_oracle(case, {"aggregate": aggregate, **layout}, dtype)


@pytest.mark.parametrize("case", [LLAMA, RESNET], ids=str)
def test_the_mean_in_float32_equals_the_oracle(case: OracleCase) -> None:
    compare_with_oracle(case, {"num_blocks": 3, "aggregate": "mean"}, torch.float32)


def test_default_options_equal_the_oracle() -> None:
    compare_with_oracle(T5, {})


@pytest.mark.parametrize("case", [LLAMA, RESNET], ids=str)
def test_a_source_per_sublayer_equals_the_oracle(case: OracleCase) -> None:
    compare_with_oracle(case, {"block_sublayers": 1})


@pytest.mark.parametrize("aggregate", ["sum", pytest.param("mean", marks=pytest.mark.slow)])
def test_eps_reaches_the_key_norm(aggregate: Aggregate) -> None:
    compare_with_oracle(LLAMA, {"eps": 0.1, "num_blocks": 3, "aggregate": aggregate})


def test_without_key_gain_the_oracles_gain_is_one() -> None:
    compare_with_oracle(LLAMA, {"key_gain": False, "num_blocks": 3})


def test_batch_statistics_in_training_equal_the_oracle() -> None:
    """Running statistics too: a branch that ran twice, or on another h, would show in them."""
    model, converted = compare_with_oracle(RESNET, {"num_blocks": 3}, training=True)

    for (name, expected), (_, actual) in zip(
        model.named_buffers(), converted.named_buffers(), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, msg=name)


def compare_with_oracle(
    case: OracleCase,
    options: dict[str, Any],
    dtype: torch.dtype = torch.float64,
    *,
    training: bool = False,
) -> tuple[nn.Module, nn.Module]:
    """Run both on the same numbers; returns the oracle's model and the converted one."""
    tolerance = TOLERANCES[dtype]
    model = case.build(dtype)
    args, kwargs = case.arguments(dtype)
    converted = attnres_compile.convert(
        copy.deepcopy(model), args, kwargs, config=AttnResConfig(**options)
    )
    model.train(training)
    converted.train(training)
    key_gain = options.get("key_gain", True)
    sites = random_sites(case.streams(model), dtype=dtype, key_gain=key_gain)
    site_names = fill_sites(converted, sites, key_gain=key_gain)
    # every parameter beyond the original's belongs to a site that the oracle knows
    base_names = [name for name, _ in model.named_parameters()]
    assert_same_names(
        parameters_of(converted), [*base_names, *(n for pair in site_names.values() for n in pair)]
    )

    mixing = Mixing(sites, **{key: options[key] for key in options if key != "key_gain"})
    expected_outputs = run_oracle(case, model, mixing, dtype).outputs
    outputs = case.run(converted, dtype)
    assert outputs.keys() == expected_outputs.keys()
    for name, expected in expected_outputs.items():
        assert output_error(outputs[name], expected) <= tolerance, name

    loss_of(expected_outputs).backward()
    loss_of(outputs).backward()
    expected_gradients = {name: gradient_of(model.get_parameter(name)) for name in base_names}
    for key, names in site_names.items():
        for name, tensor in zip(names, sites[key], strict=False):
            expected_gradients[name] = gradient_of(tensor)
    assert_close_gradients(parameters_of(converted), expected_gradients, tolerance)
    return model, converted


def fill_sites(
    converted: nn.Module, sites: dict[SiteKey, SiteParameters], *, key_gain: bool
) -> dict[SiteKey, list[str]]:
    """Copy the oracle's numbers into the converted model; returns the names, query first."""
    parameters = parameters_of(converted)
    names: dict[SiteKey, list[str]] = {}
    for stream in cast(Any, converted).plan.streams:
        for site in stream.sites:
            if site.query_name is None:
                assert site.gain_name is None
                continue
            key = (stream.name, site.depth)
            assert (site.gain_name is not None) == key_gain, key
            names[key] = [name for name in (site.query_name, site.gain_name) if name is not None]

    assert_same_names(names, sites)
    with torch.no_grad():
        for key, site_names in names.items():
            for name, value in zip(site_names, sites[key], strict=False):
                parameter = parameters[name]
                assert parameter.shape == value.shape, name
                assert parameter.dtype == value.dtype, name
                parameter.copy_(value)
    return names


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters())


def assert_same_names(actual: Any, expected: Any) -> None:
    """Compare as sets: the message then lists what is missing and what is too much."""
    assert set(actual) == set(expected)
    assert len(actual) == len(expected)


def assert_close_gradients(
    parameters: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float
) -> None:
    """Each tensor against its own largest gradient, but no less than 1e-3 of the model's.

    Some gradients are zero in exact arithmetic, like that of GPT-2's key bias.
    """
    assert_same_names(parameters, expected)
    model_scale = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        scale = max(gradient.abs().max().item(), 1e-3 * model_scale)
        actual = parameters[name].grad
        assert actual is not None, f"{name} has no gradient"
        assert (actual - gradient).abs().max().item() <= tolerance * scale, name
