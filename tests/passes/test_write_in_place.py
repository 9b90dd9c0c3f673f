"""What C++ may write over, and what must stay."""

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
from attnres_compile.passes.write_in_place import write_in_place
from tolerances import relative_error

EPS = 1e-6
Function = Callable[..., Any]


def rooms_left(function: Function, *inputs: Tensor) -> int:
    """Of those as large as the first input, after the pass; values stay the same bit for bit."""
    table = select_decomp_table()  # as sites are traced for Inductor
    graph_module = make_fx(function, table, tracing_mode="fake")(*inputs)
    expected = graph_module(*[each.clone() for each in inputs])
    write_in_place(graph_module.graph)
    graph_module.graph.lint()
    graph_module.recompile()
    actual = graph_module(*[each.clone() for each in inputs])
    assert len(actual) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
    return len([node for node in graph_module.graph.nodes if _makes_room(node, inputs[0])])


def _makes_room(node: fx.Node, like: Tensor) -> bool:
    return "empty" in str(node.target) and node.meta["val"].shape == like.shape


def site(
    partial: Tensor, branch: Tensor, *, norm: str = "none", dtype: Any = None, query: Any = None
) -> tuple[Tensor, ...]:
    """A site that adds a branch to the partial sum; its mix is not wanted where there is a norm."""
    query = partial.new_ones(partial.shape[-1]) if query is None else query
    weight = None if norm == "none" else query
    rest = (query, EPS, 2.0, norm, weight, None, EPS, dtype, False, -1)
    return cpp_phases.phase2(None, None, [], [partial, branch], *rest)


def total(x: Tensor, first: Tensor) -> Tensor:
    """The sum of two sources, as a site forms it."""
    return site(first, x)[0]


def inputs_of(tokens: int, width: int, count: int) -> list[Tensor]:
    return [torch.randn(tokens, width) for _ in range(count)]


SIZES = pytest.mark.parametrize(("tokens", "width"), [(5, 8), (33, 9), (17, 200)])


@SIZES
@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
def test_a_site_writes_over_partial_sum_and_branch(tokens: int, width: int, norm: str) -> None:
    def function(x: Tensor) -> list[Tensor]:
        return [*site(torch.cos(x), torch.tanh(x), norm=norm)]

    assert rooms_left(function, torch.randn(tokens, width)) == 0


@SIZES
def test_where_the_partial_sum_is_kept_the_new_one_is_written_over_the_branch(
    tokens: int, width: int
) -> None:
    def function(x: Tensor) -> list[Tensor]:
        partial, branch = torch.cos(x), torch.tanh(x)
        return [*site(partial, branch, norm="layer"), partial]

    assert rooms_left(function, torch.randn(tokens, width)) == 1  # for what the norm returns


def test_rows_of_another_dtype_stay() -> None:
    def function(x: Tensor, query: Tensor) -> list[Tensor]:
        partial, branch = torch.cos(x), torch.tanh(x)
        return [*site(partial, branch, norm="rms", dtype=torch.float32, query=query)]

    assert rooms_left(function, torch.randn(5, 8).bfloat16(), torch.ones(8)) == 1


def backward(
    x: Tensor, saved: Tensor, grad_partial: Tensor | None, grad_normed: Tensor, sources: int = 1
) -> list[Tensor]:
    """Of a site with a layer norm: the gradients of all its sources."""
    of_site = ([x + k for k in range(1, sources)], x, x[0], 2.0, "layer", x[1], saved, -1)
    which = (False, range(sources), True, True, True)
    return cpp_phases.phase2_backward(grad_partial, None, grad_normed, None, None, *of_site, *which)


@SIZES
def test_gradients_are_written_over_those_that_arrived(tokens: int, width: int) -> None:
    def function(x: Tensor, saved: Tensor) -> list[Tensor]:
        return backward(x, saved, torch.sin(x), torch.cos(x), sources=2)

    x, saved = torch.randn(tokens, width), torch.rand(6, tokens)
    assert rooms_left(function, x, saved) == 0


@SIZES
def test_what_arrived_holds_one_gradient_only(tokens: int, width: int) -> None:
    def function(x: Tensor, saved: Tensor) -> list[Tensor]:
        return backward(x, saved, None, torch.cos(x), sources=3)

    x, saved = torch.randn(tokens, width), torch.rand(8, tokens)
    assert rooms_left(function, x, saved) == 2


@SIZES
def test_a_source_is_completed_where_the_branch_is(tokens: int, width: int) -> None:
    def function(x: Tensor, kept: Tensor) -> list[Tensor]:
        queries = x.new_ones(3, x.shape[-1])
        return [*cpp_phases.complete([kept, torch.tanh(x)], queries, EPS, -1)]

    assert rooms_left(function, *inputs_of(tokens, width, 2)) == 0


@SIZES
@pytest.mark.parametrize("kept", [False, True])
def test_the_gradient_of_a_source_is_written_over_what_arrived(
    tokens: int, width: int, kept: bool
) -> None:
    def function(x: Tensor, logits: Tensor) -> list[Tensor]:
        queries, arrived = x.new_ones(3, x.shape[-1]), torch.sin(x)
        of_source = (arrived, logits, x, queries, logits, logits[0], -1, True, True)
        return [*cpp_phases.complete_backward(*of_source), *([arrived] if kept else [])]

    assert rooms_left(function, torch.randn(tokens, width), torch.rand(3, tokens)) == kept


@SIZES
def test_phase_1_adds_to_the_gradients_that_arrived(tokens: int, width: int) -> None:
    def function(x: Tensor, weights: Tensor) -> list[Tensor]:
        mixes, arrived = [torch.cos(x), torch.exp(x)], [torch.sin(x)]
        of_block = (arrived, [0], [x, x + 1], weights, [0, 1], True, -1)
        statistics = weights.new_zeros(2, 2, *weights.shape[2:])
        return cpp_phases.phase1_backward(mixes, [0, 1], statistics, *of_block)

    x, weights = torch.randn(tokens, width), torch.rand(2, 2, tokens)
    assert rooms_left(function, x, weights) == 1  # of the source to which nothing came


def read_later(x: Tensor) -> list[Tensor]:
    old = torch.sin(x)
    new = total(x, old)
    return [new, old + 1]


def read_later_in_another_shape(x: Tensor) -> list[Tensor]:
    old = torch.sin(x)
    flat = old.view(-1)
    new = total(x, old)
    return [new, flat + 1]


def returned(x: Tensor) -> list[Tensor]:
    old = torch.sin(x)
    return [total(x, old), old]


def part_of_more(x: Tensor) -> list[Tensor]:
    rows = torch.sin(torch.cat([x, x]))
    return [total(x, rows[: len(x)]), rows + 1]


def of_the_caller(x: Tensor) -> list[Tensor]:
    return [total(x, x.view(x.shape))]


def read_by_the_same_call(x: Tensor) -> list[Tensor]:
    old = torch.sin(x)
    return [site(old, x, query=old[0])[0]]


@pytest.mark.parametrize(
    "function",
    [
        read_later,
        read_later_in_another_shape,
        returned,
        part_of_more,
        of_the_caller,
        read_by_the_same_call,
    ],
)
def test_what_somebody_reads_after_stays(function: Function) -> None:
    assert rooms_left(function, *inputs_of(5, 8, 1)) == 2  # the sum's and the mix's


def test_what_nobody_reads_after_does_not() -> None:
    assert rooms_left(lambda x: [total(x, torch.sin(x))], *inputs_of(5, 8, 1)) == 1


def test_a_result_of_an_operator_without_a_schema_stays() -> None:
    graph_module = make_fx(lambda x: [total(x, torch.sin(x))], tracing_mode="fake")(
        *inputs_of(5, 8, 1)
    )
    (sine,) = graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default)
    sine.target = torch.sin  # for all the pass knows, a view of its input
    write_in_place(graph_module.graph)
    assert any("empty" in str(node.target) for node in graph_module.graph.nodes)


def test_inductor_reads_a_value_before_it_is_written_over() -> None:
    queries = torch.randn(3, 8)

    def model(x: Tensor) -> Tensor:
        first = torch.sin(x)
        late = first * 2  # a loop that Inductor could leave for later
        partial = first + torch.cos(x)
        mixed = attnres([x, partial], queries[0])
        partial = partial + torch.tanh(mixed)
        return attnres([x, partial], queries[1]) + late

    x = torch.randn(5, 8)
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
        compiled = torch.compile(model, backend="attnres", fullgraph=True)
        assert relative_error(compiled(x), model(x)) < 1e-6
