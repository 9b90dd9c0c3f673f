"""Comparing two runs: what counts as equal, and what errors are relative to."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from attnres_compile.comparing import Comparison, Run, compare, named_tensors, run

ALLOWED = 1e-5
ONE = torch.tensor([1.0, -4.0])


def test_errors_are_relative_to_the_largest_magnitude_expected() -> None:
    comparison = only(outputs(ONE), outputs(ONE + torch.tensor([2e-5, 0.0])))

    assert comparison.absolute == pytest.approx(2e-5, rel=1e-2)
    assert comparison.relative == pytest.approx(2e-5 / 4, rel=1e-2)
    assert comparison.passed
    assert not only(outputs(ONE), outputs(ONE + torch.tensor([2e-4, 0.0]))).passed


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({}, id="missing"),
        pytest.param({"y": ONE[:1]}, id="shape"),
        pytest.param({"y": ONE.double()}, id="dtype"),
    ],
)
def test_an_output_without_a_counterpart_fails(other: dict[str, Tensor]) -> None:
    comparison = only(outputs(ONE), Run(other, {}))

    assert comparison.relative == math.inf
    assert not comparison.passed


def test_an_output_that_only_the_other_has_fails() -> None:
    assert not only(Run({}, {}), outputs(ONE)).passed


def test_infinities_are_equal_or_infinitely_far_apart() -> None:
    masked = torch.tensor([1.0, -math.inf])

    assert only(outputs(masked), outputs(masked)).relative == 0
    assert only(outputs(masked), outputs(ONE)).relative == math.inf


def test_nan_is_never_equal() -> None:
    broken = torch.tensor([1.0, math.nan])

    comparison = only(outputs(broken), outputs(broken))

    assert math.isnan(comparison.relative)
    assert not comparison.passed


@pytest.mark.parametrize("values", [[1, 2], [True, False]])
def test_other_outputs_are_compared_exactly(values: list[Any]) -> None:
    tensor = torch.tensor(values)

    assert only(outputs(tensor), outputs(tensor)).passed
    assert not only(outputs(tensor), outputs(tensor.flip(0))).passed


def test_gradients_that_are_zero_in_exact_arithmetic_need_not_agree() -> None:
    expected = {"weight": torch.tensor([1.0]), "key.bias": torch.tensor([1e-10])}
    actual = {"weight": torch.tensor([1.0]), "key.bias": torch.tensor([-2e-10])}

    weight, bias = compare(Run({}, expected), Run({}, actual), torch.float32, ALLOWED)

    assert weight.relative == 0
    assert bias.relative == pytest.approx(3e-10 / 1e-3)


def test_the_floor_of_gradients_is_higher_in_low_precision() -> None:
    expected = {"weight": torch.ones(1), "bias": torch.zeros(1)}
    actual = {"weight": torch.ones(1), "bias": torch.full([1], 0.1)}

    relative = [
        compare(Run({}, expected), Run({}, actual), dtype, ALLOWED)[1].relative
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    ]

    assert relative == pytest.approx([100, 100, 3.2, 1.13], rel=1e-2)


def test_a_missing_gradient_is_zero() -> None:
    one, none = Run({}, {"w": torch.ones(1)}), Run({}, {"w": None})

    assert compare(none, none, torch.float32, ALLOWED) == []
    assert only(one, none).relative == 1
    assert only(none, one).relative == math.inf
    assert only(Run({}, {"w": torch.zeros(1)}), none).passed


def test_tensors_are_found_in_any_output() -> None:
    class Pair(NamedTuple):
        first: Tensor
        rest: list[Any]

    class Cache:
        def __init__(self) -> None:
            self.keys = ONE
            self.length = 3
            self.owner = self

    value = {
        "logits": ONE,
        "pair": Pair(ONE, [None, ONE]),
        "cache": Cache(),
        "model": nn.Linear(1, 1),
    }

    assert [name for name, _ in named_tensors(value)] == [
        "logits",
        "pair.first",
        "pair.rest.1",
        "cache.keys",
    ]
    assert [name for name, _ in named_tensors(ONE)] == ["output"]


def test_a_run_is_repeatable_and_leaves_the_random_state() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    x = torch.ones(8, 4)
    state = torch.get_rng_state()

    first, second = run(model, (x,), {}), run(model, (x,), {})

    assert torch.equal(torch.get_rng_state(), state)
    assert all(each.passed for each in compare(first, second, torch.float32, 0.0))
    assert (first.outputs["output"] == 0).any()


def test_a_run_does_not_change_its_inputs() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor, cache: dict[str, Tensor]) -> Tensor:
            cache["seen"].add_(1)
            return x.mul_(2) * self.weight

    x, cache = torch.ones(2), {"seen": torch.zeros(1)}
    with torch.no_grad():
        result = run(InPlace(), (x,), {"cache": cache})

    assert torch.equal(x, torch.ones(2))
    assert cache["seen"] == 0
    assert result.gradients["weight"] is not None


def test_a_frozen_parameter_has_no_gradient_to_compare() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)

    assert list(run(model, (torch.ones(1, 2),), {}).gradients) == ["weight"]


def outputs(tensor: Tensor) -> Run:
    return Run({"y": tensor}, {})


def only(expected: Run, actual: Run) -> Comparison:
    (comparison,) = compare(expected, actual, torch.float32, ALLOWED)
    return comparison
