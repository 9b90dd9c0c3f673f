"""Whole models with delta sources: counts by hand, losslessness, forward passes by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import attnres_compile
import oracle_deltas
from attnres_compile import AttnResConfig
from attnres_compile.capture import capture
from attnres_compile.errors import NothingToConvertError
from attnres_compile.planning import plan_of_capture
from conversions import randomize, sites_of
from delta_cases import (
    CASES,
    CONFIG,
    PLANNED_ONLY,
    PLANS_ALIKE,
    TOLERANCE,
    Case,
    arguments,
    assert_same_gradient,
    with_slow,
)
from oracle_mixer import Mixing
from tolerances import relative_error
from zoo_case import float_outputs
from zoo_conversion import assert_everything_learns, assert_lossless, new_names, run


@pytest.mark.parametrize("case", with_slow([*CASES, *PLANNED_ONLY], PLANS_ALIKE), ids=str)
def test_counts_and_both_routes(case: Case) -> None:
    """A site at every depth; one less query than sites in every stream; by both routes alike."""
    model, inputs = case.build()
    args = arguments(case, inputs)
    plan = attnres_compile.plan(model, args, config=CONFIG)
    assert {s.name: len(s.sublayers) for s in plan.streams} == case.sublayers
    assert all(stream.deltas for stream in plan.streams)
    assert [r.kind for r in plan.refusals] == ["single-sublayer"] * case.too_short
    for stream in plan.streams:
        assert [site.depth for site in stream.sites] == list(range(len(stream.sublayers) + 1))
        assert [site.num_sources for site in stream.sites] == [
            1 + (depth + 1) // 2 for depth in range(len(stream.sublayers) + 1)
        ]
    exported = plan_of_capture(capture(model, args, route="export"), model, CONFIG)
    assert shape_of_plan(exported) == shape_of_plan(plan)


def shape_of_plan(plan: Any) -> Any:
    return [
        (s.name, s.owner, s.deltas, s.channel_dim, [(site.depth, site.state) for site in s.sites])
        for s in plan.streams
    ]


@pytest.mark.parametrize("case", with_slow([*CASES, *PLANNED_ONLY], PLANS_ALIKE), ids=str)
def test_off_by_default_and_offered(case: Case) -> None:
    model, inputs = case.build()
    plan = attnres_compile.plan(model, arguments(case, inputs))
    offered = [r for r in plan.refusals if "AttnResConfig(delta_sources=True)" in r.reason]
    converted_anyway = {s.name: len(s.sublayers) for s in plan.streams}
    if case.name == "lambdas":  # each layer alone is a plain stream, of two sublayers
        assert converted_anyway == {"stream": 2, "stream#2": 2, "stream#3": 2}
        return
    assert not converted_anyway
    assert len(offered) == sum(case.sublayers.values())
    with pytest.raises(NothingToConvertError, match=r"AttnResConfig\(delta_sources=True\)"):
        plan.require_streams()


@pytest.mark.parametrize("case", with_slow(CASES, {"resnet", "bert"}), ids=str)
def test_lossless_and_stripped(case: Case) -> None:
    """Outputs and gradients at zero queries; then with random ones everything learns."""
    model, inputs = case.build()
    original = copy.deepcopy(model)
    converted = attnres_compile.convert(model, (inputs,), config=CONFIG)
    expected = run(original, ((inputs,), {}))
    assert_lossless(run(converted, ((inputs,), {})), expected, TOLERANCE)
    stripped = attnres_compile.strip(converted)
    assert type(stripped) is type(original)
    assert all(torch.equal(a, original.state_dict()[n]) for n, a in stripped.state_dict().items())
    randomize(converted)
    plan: Any = converted.plan
    assert_everything_learns(run(converted, ((inputs,), {})), expected, new_names(plan))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("aggregate", "block_sublayers"),
    [
        pytest.param("sum", 2, id="sum-2"),
        *(
            pytest.param(aggregate, size, id=f"{aggregate}-{size}", marks=pytest.mark.slow)
            for aggregate, size in (("sum", 1), ("sum", 4), ("mean", 1), ("mean", 2), ("mean", 4))
        ),
    ],
)
def test_random_queries_equal_the_forward_pass_by_hand(
    case: Case, aggregate: Any, block_sublayers: int
) -> None:
    compare(case, aggregate, block_sublayers)


def test_sites_that_are_left_out_read_the_state() -> None:
    """In BERT attention reads at even depths; 3 layers, so depths 2 and 4 (0 is the root)."""
    left_out = frozenset(("encoder.layer", depth) for depth in (1, 3, 5, 6))
    compare(CASES[0], "sum", 2, sites=("*.attention",), left_out=left_out)


def compare(
    case: Case,
    aggregate: Any,
    block_sublayers: int,
    *,
    sites: tuple[str, ...] | None = None,
    left_out: frozenset[tuple[str, int]] = frozenset(),
) -> None:
    """Outputs, gradients of all weights, and of all queries and gains."""
    model, inputs = case.build()
    options: Any = {"aggregate": aggregate, "block_sublayers": block_sublayers}
    config = AttnResConfig(delta_sources=True, sites=sites, **options)
    converted: Any = attnres_compile.convert(copy.deepcopy(model), (inputs,), config=config)
    randomize(converted)
    mixes = sites_of(converted)
    for site in mixes.values():
        site.query.requires_grad_()
        site.gain.requires_grad_()
    assert case.oracle is not None
    mixing = Mixing(mixes, left_out=left_out, **options)
    expected = list(case.oracle(model, mixing, inputs).values())
    found = float_outputs(converted(inputs))
    assert len(found) == len(expected)
    for actual, by_hand in zip(found, expected, strict=True):
        assert relative_error(actual, by_hand) <= TOLERANCE
    loss(found).backward()
    loss(expected).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert_same_gradient(converted.get_parameter(name).grad, parameter.grad, name)
    for stream in converted.plan.streams:
        assert {(stream.name, s.depth) for s in stream.sites if s.left_out} == left_out
        for planned in (site for site in stream.sites if site.query_name):
            site = mixes[stream.name, planned.depth]
            for name, value in ((planned.query_name, site.query), (planned.gain_name, site.gain)):
                assert_same_gradient(converted.get_parameter(name).grad, value.grad, name)


def loss(outputs: list[Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    terms = [(o * torch.randn(o.shape, generator=generator)).sum() for o in outputs]
    return torch.stack(terms).sum()


def test_a_branch_that_reads_the_state_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative twin of the comparison: an oracle that reads one site less does not pass."""
    read = oracle_deltas.DeltaMixer.read

    def one_plain(self: Any) -> Tensor:
        return self.state if len(self._states) == 3 else read(self)

    monkeypatch.setattr(oracle_deltas.DeltaMixer, "read", one_plain)
    with pytest.raises(AssertionError):
        compare(CASES[2], "sum", 2)


def test_a_carrier_that_takes_the_mix_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    state = property(oracle_deltas.DeltaMixer.read)
    monkeypatch.setattr(oracle_deltas.DeltaMixer, "state", state)
    monkeypatch.setattr(
        oracle_deltas.DeltaMixer, "read", lambda self: self.state if len(self._states) > 1 else 0
    )
    with pytest.raises((AssertionError, RecursionError)):
        compare(CASES[2], "sum", 2)


def rounding_error(size: float) -> float:
    """In float32, of a converted DeepNorm whose root is so many times as large as its states."""
    model, inputs = next(case for case in CASES if case.name == "deep_norm").build()
    exact = model(inputs * size)
    inputs = (inputs * size).float()
    converted = attnres_compile.convert(model.float(), (inputs,), config=CONFIG)
    return relative_error(converted(inputs).double(), exact)


def test_a_large_root_costs_digits() -> None:
    """As documented: differences are rounded at the size of the root."""
    assert rounding_error(1) < 2e-6
    assert 1e-5 < rounding_error(1e4) < 4e-3
