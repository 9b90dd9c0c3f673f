"""What calls of the C++ library can do without, and what they cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from attnres_compile.kernels import cpp_phases
from attnres_compile.passes.cpp_calls import arguments_of, phase_of
from attnres_compile.passes.trim_calls import trim_calls
from attnres_compile.passes.write_in_place import write_in_place

Function = Callable[[Tensor, Tensor, Tensor], Any]


def trimmed(
    function: Function,
    tracing_mode: str = "fake",
    passes: Sequence[Callable[[fx.Graph], None]] = (trim_calls,),
) -> dict[str, Any]:
    """The arguments of the last call, after the pass; values stay the same bit for bit."""
    x, query, gain = torch.randn(6, 8), torch.randn(8), torch.randn(8)
    graph_module = make_fx(function, select_decomp_table(), tracing_mode)(x, query, gain)
    expected = graph_module(x, query, gain)
    for each in passes:
        each(graph_module.graph)
    graph_module.graph.lint()
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    for actual, value in zip(graph_module(x, query, gain), expected, strict=True):
        assert torch.equal(actual, value)
    calls = [node for node in graph_module.graph.nodes if phase_of(node) is not None]
    return arguments_of(calls[-1])


def site(sources: list[Tensor], query: Tensor, saved: bool = False) -> list[Tensor]:
    one = (query, 1e-6, 2.0, "rms", None, None, 1e-6, None, True, -1)
    _, mixed, normed, statistics = cpp_phases.phase2(None, None, sources, (), *one)
    return [mixed, normed, statistics] if saved else [mixed, normed]


def targets(nodes: list[fx.Node]) -> set[str]:
    return {str(node.target) for node in nodes}


def test_rows_are_read_in_the_shape_that_they_have() -> None:
    """And not as views of it."""
    given = trimmed(lambda x, query, gain: site([x.sin().view(2, 3, 8), x.view(2, 3, 8)], query))
    assert targets(given["sources"]) == {"aten.sin.default", "x_1"}


def reversed_rows(x: Tensor, query: Tensor, gain: Tensor) -> list[Tensor]:
    return site([x.sin().view(12, 4)], query[:4].clone())


def turned(x: Tensor, query: Tensor, gain: Tensor) -> list[Tensor]:
    return site([x.sin().view(2, 3, 8).transpose(0, 1)], query)


@pytest.mark.parametrize(
    ("function", "target"), [(reversed_rows, "aten.view.default"), (turned, "aten.clone.default")]
)
def test_rows_that_are_others_stay_views(function: Function, target: str) -> None:
    assert targets(trimmed(function)["sources"]) == {target}


def weights_of(x: Tensor, query: Tensor, gain: Tensor) -> list[Tensor]:
    logits = [x.new_ones(3, 6), x.new_zeros(3, 6)]
    mixes, statistics, weights = cpp_phases.phase1([x, x.sin()], logits, -1)
    return [*mixes, statistics, weights]


def test_weights_are_written_for_a_backward_pass_only() -> None:
    def without(x: Tensor, query: Tensor, gain: Tensor) -> list[Tensor]:
        return weights_of(x, query, gain)[:-1]

    assert trimmed(without)["weights"] is None
    assert trimmed(weights_of)["weights"] is not None


def test_the_branch_and_gradients_are_read_without_views_too() -> None:
    def backward(x: Tensor, query: Tensor, gain: Tensor) -> list[Tensor]:
        rows, saved = x.view(2, 3, 8), x.new_ones(2, 2, 3)
        of_site = (None, None, [rows], None, query, 2.0, "none", None, saved, -1)
        return cpp_phases.phase2_backward(
            None, x.exp().view(2, 3, 8), None, *of_site, False, [0], True, False, False
        )

    given = trimmed(backward)
    assert given["grad_mixed"].target is torch.ops.aten.exp.default
    assert given["sources"][0].op == "placeholder"


def written_over(x: Tensor, query: Tensor, gain: Tensor) -> list[Tensor]:
    sources = [x.view(2, 3, 8)]
    addends = [x.sin().view(2, 3, 8), x.exp().view(2, 3, 8)]
    one = (query, 1e-6, 2.0, "none", None, None, 0.0, None, True, -1)
    partial, *_ = cpp_phases.phase2(None, None, sources, addends, *one)
    return site([*sources, partial], query)


def test_what_a_call_writes_to_keeps_its_node() -> None:
    """Once the partial sum lies where its skip was, by the name of the view."""
    before, partial = trimmed(written_over, passes=(write_in_place, trim_calls))["sources"]
    assert before.op == "placeholder"
    assert partial.target is torch.ops.aten.view.default


def test_a_query_comes_with_its_gain() -> None:
    given = trimmed(lambda x, query, gain: site([x, x + 1], query * gain))
    assert {given["query"].op, given["gain"].op} == {"placeholder"}


def read_by_another(x: Tensor, query: Tensor, gain: Tensor) -> list[Tensor]:
    product = query * gain
    return [*site([x, x + 1], product), product]


def with_a_number(x: Tensor, query: Tensor, gain: Tensor) -> list[Tensor]:
    return site([x, x + 1], query * 2)


def with_a_size(x: Tensor, query: Tensor, gain: Tensor) -> list[Tensor]:
    return site([x, x + 1], query * x.shape[0])


def spread(x: Tensor, query: Tensor, gain: Tensor) -> list[Tensor]:
    return site([x, x + 1], query * gain[:1])


def of_a_wider_type(x: Tensor, query: Tensor, gain: Tensor) -> list[Tensor]:
    return site([x, x + 1], query * gain.bfloat16())


@pytest.mark.parametrize(
    "function", [read_by_another, with_a_number, with_a_size, spread, of_a_wider_type]
)
def test_other_products_stay(function: Function) -> None:
    given = trimmed(function, "symbolic")
    assert given["query"].target is torch.ops.aten.mul.Tensor
    assert given["gain"] is None


def test_statistics_that_nobody_reads_are_not_asked_for() -> None:
    assert trimmed(lambda x, query, gain: site([x, x + 1], query))["saved"] is None
    kept = trimmed(lambda x, query, gain: site([x, x + 1], query, saved=True))
    assert kept["saved"] is not None
