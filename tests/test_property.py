"""In random residual networks the analysis finds exactly what is there, and loses nothing of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

import attnres_compile
from attnres_compile import AttnResConfig
from attnres_compile.errors import NothingToConvertError
from attnres_compile.passes.find_streams import find_streams
from attnres_compile.passes.graph_values import module_path
from passes_helpers import trace
from random_recipes import Recipe, recipes
from random_residual_graphs import Answer, Stream, build
from random_residual_modules import BATCH, LENGTH, WIDTH, Network
from rewriting_helpers import rewrite_module, run_both
from tolerances import assert_matches


def found_in(module: fx.GraphModule, network: Network) -> Answer:
    """What the analysis says, in the labels of the network's additions."""
    labels = network.labels()

    def label(node: fx.Node) -> int:
        return labels[module_path(node)]

    analysis = find_streams(module.graph)
    streams = [
        Stream(
            tuple(tuple(label(a.node) for a in sublayer) for sublayer in stream.sublayers),
            tuple(site.depth for site in stream.sites),
        )
        for stream in analysis.streams
    ]
    refused = frozenset(labels[refusal.module_path] for refusal in analysis.refusals)
    return Answer(tuple(sorted(streams)), refused)


def an_input(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(BATCH, LENGTH, WIDTH, dtype=dtype)


def check_answer(recipe: Recipe, route: str) -> None:
    network, answer = build(recipe)
    assert found_in(trace(network, an_input(), route=route), network) == answer


@settings(max_examples=60)
@given(recipes())
def test_the_analysis_finds_exactly_the_streams_there_are(recipe: Recipe) -> None:
    check_answer(recipe, "symbolic")


@settings(max_examples=6)
@given(recipes(largest=4))
@pytest.mark.parametrize("route", ["dynamo", "export"])
def test_so_it_does_in_captured_graphs(route: str, recipe: Recipe) -> None:
    torch._dynamo.reset()
    check_answer(recipe, route)


@settings(max_examples=25)
@given(recipes(), st.sampled_from(["full", 1, 2, 3]))
def test_sources_sum_to_the_states_and_zero_queries_change_nothing(
    recipe: Recipe, num_blocks: Any
) -> None:
    network, answer = build(recipe, torch.float64)
    x = an_input(torch.float64)
    with torch.no_grad():
        rewritten = rewrite_module(trace(network, x), AttnResConfig(num_blocks=num_blocks))
        run = run_both(rewritten, [x])
    depths = [depth for stream in answer.streams for depth in stream.sites]
    assert len(rewritten.sites) == sum(depth > 0 for depth in depths)
    for name, total, state in zip(rewritten.sites, run.source_sums, run.states, strict=True):
        assert_matches(total.view_as(state), state, name=f"sources of {name}", factor=10)
    for number, (actual, expected) in enumerate(zip(run.actual, run.expected, strict=True)):
        assert_matches(actual, expected, name=f"output {number}", factor=100)


@settings(max_examples=4)
@given(recipes(largest=4))
def test_conversion_is_lossless(recipe: Recipe) -> None:
    torch._dynamo.reset()
    network, answer = build(recipe, torch.float64)
    x = an_input(torch.float64)
    if not answer.streams:
        with pytest.raises(NothingToConvertError):
            attnres_compile.convert(network, (x,))
        return
    converted = attnres_compile.convert(network, (x,))
    labels = network.labels()
    planned = [[labels[a.module_path] for a in s.additions] for s in converted.plan.streams]
    expected = [[label for sublayer in s.sublayers for label in sublayer] for s in answer.streams]
    assert sorted(planned) == sorted(expected)
    with torch.no_grad():
        before, after = network(x), converted(x)
    for number, (actual, wanted) in enumerate(zip(after, before, strict=True)):
        assert_matches(actual, wanted, name=f"output {number}", factor=100)
