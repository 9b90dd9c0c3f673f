"""What the C++ phases may write over, and what must stay."""

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
    table = select_decomp_table()  # as the phases are traced for Inductor
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


def total(x: Tensor, first: Tensor) -> Tensor:
    """The sum of two sources, as the phase that completes one forms it."""
    return cpp_phases.complete([first, x], x.new_ones(3, x.shape[-1]), EPS, -1)[0]


def inputs_of(tokens: int, width: int, count: int) -> list[Tensor]:
    return [torch.randn(tokens, width) for _ in range(count)]


SIZES = pytest.mark.parametrize(("tokens", "width"), [(5, 8), (33, 9), (17, 200)])


@SIZES
def test_a_source_is_completed_where_its_partial_sum_was(tokens: int, width: int) -> None:
    def function(x: Tensor) -> list[Tensor]:
        logits = cpp_phases.complete([torch.sin(x), x], x.new_ones(9, width), EPS, -1)
        return [*logits]

    assert rooms_left(function, *inputs_of(tokens, width, 1)) == 0


@SIZES
@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
def test_a_site_writes_over_partial_sum_and_branch(tokens: int, width: int, norm: str) -> None:
    def function(x: Tensor, statistics: Tensor) -> list[Tensor]:
        before, partial, branch = torch.sin(x), torch.cos(x), torch.tanh(x)
        query, weight = x[0], x[1]
        results = cpp_phases.phase2(
            before, statistics, [], [partial, branch], query, EPS, 2.0, norm, weight, None, EPS,
            x.dtype, False, -1,
        )  # fmt: skip
        return [*results]

    x, statistics = torch.randn(tokens, width), torch.randn(2, tokens)
    assert rooms_left(function, x, statistics) == 0


@SIZES
def test_where_the_partial_sum_is_kept_the_new_one_is_written_over_the_branch(
    tokens: int, width: int
) -> None:
    def function(x: Tensor, statistics: Tensor) -> list[Tensor]:
        before, partial, branch = torch.sin(x), torch.cos(x), torch.tanh(x)
        results = cpp_phases.phase2(
            before, statistics, [], [partial, branch], x[0], EPS, 2.0, "layer", x[1], None, EPS,
            x.dtype, False, -1,
        )  # fmt: skip
        return [*results, partial]

    x, statistics = torch.randn(tokens, width), torch.randn(2, tokens)
    assert rooms_left(function, x, statistics) == 0


def test_rows_of_another_dtype_stay() -> None:
    def function(x: Tensor, statistics: Tensor) -> list[Tensor]:
        before, partial, branch = torch.sin(x), torch.cos(x), torch.tanh(x)
        query = statistics.new_ones(8)
        results = cpp_phases.phase2(
            before, statistics, [], [partial, branch], query, EPS, 2.0, "rms", None, None, EPS,
            torch.float32, False, -1,
        )  # fmt: skip
        return [*results]

    assert rooms_left(function, torch.randn(5, 8).bfloat16(), torch.randn(2, 5)) == 1


@SIZES
def test_a_gradient_is_written_over_the_one_that_arrived(tokens: int, width: int) -> None:
    def function(x: Tensor, saved: Tensor) -> list[Tensor]:
        arriving = [torch.sin(x), torch.cos(x)]
        return cpp_phases.phase2_backward(
            arriving[0], None, arriving[1], x, saved[:2], [], x + 1, x[0], 2.0, "layer", x[1],
            saved, -1, True, [0], True, True, True,
        )  # fmt: skip

    x, saved = torch.randn(tokens, width), torch.rand(4, tokens)
    assert rooms_left(function, x, saved) == 0


@SIZES
@pytest.mark.parametrize("arrived", [[0, 1], [1]])
def test_gradients_of_sources_are_written_over_those_that_they_add(
    tokens: int, width: int, arrived: list[int]
) -> None:
    def function(x: Tensor, logits: Tensor) -> list[Tensor]:
        carriers = [torch.sin(x), torch.cos(x)][-len(arrived) :]
        statistics = torch.stack([logits, logits], 1)
        return cpp_phases.phase1_backward(
            [x * 2, x * 3], [0, 2], statistics, carriers, arrived, [x, -x], [logits, -logits],
            statistics, [0, 1], True, -1,
        )  # fmt: skip

    x, logits = torch.randn(tokens, width), torch.randn(5, tokens)
    assert rooms_left(function, x, logits) == 2 - len(arrived)


@SIZES
def test_the_gradient_of_a_completed_source_is_written_over_its_own(
    tokens: int, width: int
) -> None:
    def function(x: Tensor, logits: Tensor) -> list[Tensor]:
        queries = x[:3]
        return cpp_phases.complete_backward(
            torch.sin(x), logits, x, queries, logits, logits[0], -1, True, True
        )

    x, logits = torch.randn(tokens, width), torch.randn(3, tokens)
    assert rooms_left(function, x, logits) == 0


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
    source = cpp_phases.complete([old, x], old[:3], EPS, -1)
    return [*source]


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
    assert rooms_left(function, *inputs_of(5, 8, 1)) == 1


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
