"""Files of both exporters convert as the models themselves do, and compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

import attnres_compile
from attnres_compile import AttnResConfig
from attnres_compile.checkpoint.onnx import convert_file, plan_file
from attnres_compile.onnx_verification import run_file
from onnx_exports import EXPORTS, Export, export, fill, randomized

LOSSLESS, FAITHFUL = 1e-5, 1e-4
QUICK = ("vit", "convnext")  # by the older exporter; the newer takes 5 to 25 s a model
CASES = [
    pytest.param(
        case,
        dynamo,
        marks=() if case.name in QUICK and not dynamo else pytest.mark.slow,
        id=f"{case}-{'dynamo' if dynamo else 'torchscript'}",
    )
    for case in EXPORTS
    for dynamo in (False, True)
]


def relative(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


def outputs(path: Path, feeds: dict[str, Tensor]) -> Tensor:
    (value,) = run_file(path, {name: each.numpy() for name, each in feeds.items()}).values()
    return value


def counts(plan: Any) -> list[list[tuple[int, int]]]:
    """Depth and number of sources of every site, per stream."""
    return [[(site.depth, site.num_sources) for site in s.sites] for s in plan.streams]


@pytest.mark.parametrize(("case", "dynamo"), CASES)
def test_file_converts_as_the_model_does(case: Export, dynamo: bool, tmp_path: Path) -> None:
    model, feeds = case.build()
    config = AttnResConfig(num_blocks=2)
    plain = export(model, feeds, tmp_path / "plain.onnx", dynamo=dynamo)
    converted = tmp_path / "converted.onnx"
    plan = convert_file(plain, converted, config, {})
    assert tuple(sum(s.query_name is not None for s in t.sites) for t in plan.streams) == case.sites
    twin = randomized(model, feeds, config)
    assert counts(plan) == counts(twin.plan)
    onnx.checker.check_model(str(converted), full_check=True)

    assert relative(outputs(converted, feeds), outputs(plain, feeds)) <= LOSSLESS
    fill(converted, plan, twin)
    onnx.checker.check_model(str(converted), full_check=True)
    with torch.no_grad():
        expected = twin(*feeds.values())
        original = model(*feeds.values())
    actual = outputs(converted, feeds)
    assert relative(actual, expected) <= FAITHFUL
    assert relative(actual, original) > 100 * FAITHFUL  # the queries do something

    larger = {name: torch.cat([value, value.flip(0)[:1]]) for name, value in feeds.items()}
    with torch.no_grad():
        expected = twin(*larger.values())
    assert relative(outputs(converted, larger), expected) <= FAITHFUL


@pytest.mark.parametrize(("key_gain", "aggregate"), [(True, "sum"), (False, "mean")])
def test_options_reach_the_file(key_gain: bool, aggregate: Any, tmp_path: Path) -> None:
    model, feeds = next(case for case in EXPORTS if case.name == "vit").build()
    # eps this large shows: were it left out, or the default, the outputs would differ by more
    config = AttnResConfig(num_blocks="full", key_gain=key_gain, aggregate=aggregate, eps=0.3)
    plain = export(model, feeds, tmp_path / "plain.onnx", dynamo=False)
    converted = tmp_path / "converted.onnx"
    plan = convert_file(plain, converted, config, {}, inline=key_gain)
    assert (plan.streams[0].sites[1].gain_name is not None) is key_gain
    twin = randomized(model, feeds, config)
    fill(converted, plan, twin)
    with torch.no_grad():
        expected = twin(*feeds.values())
    assert relative(outputs(converted, feeds), expected) <= FAITHFUL
    functions = onnx.load(converted).functions
    assert len(functions) == (0 if key_gain else 6)  # sites of 2 to 7 sources


def test_names_are_those_of_the_model(tmp_path: Path) -> None:
    model, feeds = next(case for case in EXPORTS if case.name == "vit").build()
    plain = export(model, feeds, tmp_path / "plain.onnx", dynamo=False)
    plan = plan_file(plain, AttnResConfig(), {})
    twin = attnres_compile.plan(model, tuple(feeds.values()))
    names = [[s.query_name for s in t.sites] for t in plan.streams]
    assert names == [[s.query_name for s in t.sites] for t in twin.streams]
    readers = [[s.readers[0].scale_invariant for s in t.sites] for t in plan.streams]
    assert readers == [[True] * 7]
