"""Gradients of sources that C++ adds to what arrived, and sums that must stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from attnres_compile.functional import attnres
from attnres_compile.kernels import cpp_phases
from attnres_compile.passes.absorb_gradients import absorb_gradients
from attnres_compile.passes.inline_cpp_phases import InlineCppPhases
from tolerances import relative_error

Function = Callable[..., Any]
ADD = torch.ops.aten.add.Tensor


def additions_left(function: Function) -> int:
    """After the pass; values stay the same to rounding."""
    x, saved = torch.randn(5, 8).double(), torch.rand(4, 5).double()
    graph_module = make_fx(function, select_decomp_table(), tracing_mode="fake")(x, saved)
    expected = graph_module(x, saved)
    absorb_gradients(graph_module.graph)
    graph_module.graph.lint()
    graph_module.recompile()
    for actual, value in zip(graph_module(x, saved), expected, strict=True):
        assert relative_error(actual, value) < 1e-14
    return len(graph_module.graph.find_nodes(op="call_function", target=ADD))


def backward(x: Tensor, saved: Tensor, grad_partial: Tensor | None = None) -> list[Tensor]:
    """The gradients of a source and of the partial sum, which a site of both finds."""
    site = (None, None, [x.cos()], x.sin(), x[0], 2.0, "none", None, saved, -1)
    return cpp_phases.phase2_backward(
        grad_partial, x.exp(), None, *site, False, [0, 1], False, False, False
    )


def before_the_site(x: Tensor, saved: Tensor) -> list[Tensor]:
    arrived = [x * 2, x * 3]
    found = backward(x, saved)
    return [arrived[0] + found[0], found[1] + arrived[1]]


def by_three_sites(x: Tensor, saved: Tensor) -> list[Tensor]:
    first, second, third = (backward(x * k, saved) for k in (1, 2, 3))
    return [first[k] + second[k] + third[k] for k in (0, 1)]


def in_another_order(x: Tensor, saved: Tensor) -> list[Tensor]:
    first, second, third = (backward(x * k, saved) for k in (1, 2, 3))
    return [third[0] + (second[0] + first[0])]


@pytest.mark.parametrize("function", [before_the_site, by_three_sites, in_another_order])
def test_what_was_found_before_is_added_by_the_site(function: Function) -> None:
    assert additions_left(function) == 0


def after_the_site(x: Tensor, saved: Tensor) -> list[Tensor]:
    found = backward(x, saved)
    return [found[0] + x * 2]


def by_the_same_site(x: Tensor, saved: Tensor) -> list[Tensor]:
    found = backward(x, saved)
    return [found[0] + found[1]]


def read_by_itself(x: Tensor, saved: Tensor) -> list[Tensor]:
    arrived = x * 2
    found = backward(x, saved)
    return [arrived + found[0], found[0] * 2]


def read_by_a_later_site(x: Tensor, saved: Tensor) -> list[Tensor]:
    arrived = x * 2
    found = backward(x, saved)
    return [arrived + found[1], *backward(x, saved, found[1])]


def beside_a_gradient_of_the_partial_sum(x: Tensor, saved: Tensor) -> list[Tensor]:
    arrived = x * 2
    return [arrived + backward(x, saved, x * 3)[1]]


def twice_itself(x: Tensor, saved: Tensor) -> list[Tensor]:
    found = backward(x, saved)
    return [found[0] + found[0]]


def of_another_shape(x: Tensor, saved: Tensor) -> list[Tensor]:
    arrived = x[0] * 2
    return [arrived + backward(x, saved)[0]]


def of_another_layout(x: Tensor, saved: Tensor) -> list[Tensor]:
    arrived = (x * 2).t().contiguous().t()
    return [arrived + backward(x, saved)[0]]


def of_another_dtype(x: Tensor, saved: Tensor) -> list[Tensor]:
    arrived = (x * 2).float()
    return [arrived + backward(x, saved)[0]]


def with_a_factor(x: Tensor, saved: Tensor) -> list[Tensor]:
    arrived = x * 2
    return [torch.add(arrived, backward(x, saved)[0], alpha=3)]


@pytest.mark.parametrize(
    "function",
    [
        after_the_site,
        by_the_same_site,
        read_by_itself,
        read_by_a_later_site,
        beside_a_gradient_of_the_partial_sum,
        twice_itself,
        of_another_shape,
        of_another_layout,
        of_another_dtype,
        with_a_factor,
    ],
)
def test_other_sums_stay(function: Function) -> None:
    assert additions_left(function) == 1


def test_in_a_compiled_network_no_sum_of_gradients_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And all of them reach the operators, through Inductor."""
    graphs = []
    inline = InlineCppPhases.__call__

    def watched(self: InlineCppPhases, graph: fx.Graph) -> None:
        inline(self, graph)
        graphs.append(graph)

    monkeypatch.setattr(InlineCppPhases, "__call__", watched)
    weight, queries = torch.randn(8, 8).double(), torch.randn(6, 8).double()

    def model(x: Tensor) -> Tensor:
        blocks = [x]
        for query in queries.unbind():
            blocks.append(torch.tanh(attnres(blocks, query) @ weight))
        return attnres(blocks, queries[0])

    x = torch.randn(5, 8).double().requires_grad_()
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(model, backend="attnres", fullgraph=True)
        (actual,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    assert relative_error(actual, expected) < 1e-12
    _, of_gradients = graphs
    assert not of_gradients.find_nodes(op="call_function", target=ADD)
