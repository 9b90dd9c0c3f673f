"""Loops over layers become their iterations; what counts as one, and what does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._higher_order_ops import while_loop
from torch._higher_order_ops.scan import scan
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from attnres_compile.capture import unroll_exported
from attnres_compile.passes.find_streams import find_streams
from attnres_compile.passes.graph_values import module_path
from attnres_compile.passes.inline_checkpoints import REGION
from attnres_compile.passes.loops import MOST_TRIPS, is_loop
from passes_helpers import WIDTH, Body, Branches, trace

ROUTES = pytest.mark.parametrize("route", ["dynamo", "export"])


def step(x: Tensor, weight: Tensor) -> Tensor:
    return x + torch.tanh(F.layer_norm(x, (WIDTH,)) @ weight)


def stacked(m: Any) -> Tensor:
    return torch.stack((m.f.weight, m.g.weight, m.h.weight))


def over(xs: Callable[[Any, Tensor], Any], **options: Any) -> Body:
    """A scan with a residual addition in each iteration."""

    def body(m: Any, x: Tensor) -> Any:
        def turn(state: Tensor, slices: Any) -> tuple[Tensor, Tensor]:
            weight = m.f.weight + slices.sum() if slices.dim() < 2 else slices
            state = step(state, weight)
            return state, state.mean()

        return scan(turn, x, xs(m, x), **options)

    return body


def counting(
    start: Callable[[Any, Tensor], Tensor],
    more: Callable[[Any, Tensor, Tensor], Tensor],
    after: Callable[[Tensor], Tensor] = lambda i: i + 1,
) -> Body:
    """A while_loop with a residual addition in each iteration."""

    def body(m: Any, x: Tensor) -> Any:
        def turn(i: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return after(i), step(x, m.f.weight)

        return while_loop(lambda i, x: more(m, i, x), turn, (start(m, x), x))[1]

    return body


def zero(m: Any, x: Tensor) -> Tensor:
    return torch.tensor(0)


def written(write: Callable[[Tensor], Any], shape: tuple[int, ...] = ()) -> Body:
    """A while_loop whose counter is changed in place before the loop."""

    def start(m: Any, x: Tensor) -> Tensor:
        i = torch.zeros(shape, dtype=torch.long)
        write(i)
        return i

    return counting(start, lambda m, i, x: (i < 3).all())


def first_is_one(i: Tensor) -> None:
    i[0] = 1


def nested(m: Any, x: Tensor) -> Any:
    """Two iterations around three."""

    def outer(state: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        def inner(state: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            state = step(state, weight)
            return state, state.sum()

        state, sums = scan(inner, state, stacked(m))
        return state, sums * scale

    return scan(outer, x, torch.ones(2))


def two_a_turn(m: Any, x: Tensor) -> Any:
    def turn(x: Tensor, weights: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x = step(x, weights[0])
        return step(x, weights[1]), x.sum()

    return scan(turn, x, (stacked(m), stacked(m).flip(0)))


def beside(other: Callable[[Any, Tensor], Tensor]) -> Body:
    """A scan over weights and something else, of three slices too."""

    def body(m: Any, x: Tensor) -> Any:
        def turn(x: Tensor, slices: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return step(x, slices[0] * slices[1].sum()), x.sum()

        return scan(turn, x, (stacked(m), other(m, x)))

    return body


def two_carried(m: Any, x: Tensor) -> Any:
    """The second value takes part in the branches, and is no stream itself."""

    def turn(carried: tuple[Tensor, Tensor], weight: Tensor) -> Any:
        x, mean = carried
        x = step(x, weight * mean)
        return (x, F.relu(mean).mean()), x.sum()

    return scan(turn, (x, x.mean()), stacked(m))


LOOPS: dict[str, tuple[Body, int]] = {
    "scan over weights": (over(lambda m, x: stacked(m)), 3),
    "scan over a buffer": (over(lambda m, x: m.memory), 4),
    "scan over numbers": (over(lambda m, x: torch.arange(5)), 5),
    "scan over weights and numbers": (beside(lambda m, x: torch.arange(3)), 3),
    "scan in reverse": (over(lambda m, x: stacked(m), reverse=True), 3),
    "two additions an iteration": (two_a_turn, 6),
    "two carried values": (two_carried, 3),
    "while_loop that counts": (counting(zero, lambda m, i, x: i < 3), 3),
    "while_loop that counts down": (
        counting(lambda m, x: torch.full((), 6), lambda m, i, x: i > 0, lambda i: i - 2),
        3,
    ),
    "while_loop from a number that is read only": (written(lambda i: i.add(1)), 3),
    "while_loop from a number of an input's dtype": (
        counting(lambda m, x: x.new_zeros((), dtype=torch.long), lambda m, i, x: i < 3),
        3,
    ),
    "while_loop from a number on an input's device": (
        counting(lambda m, x: torch.zeros((), device=x.device), lambda m, i, x: i < 3),
        3,
    ),
    "while_loop up to a size": (counting(zero, lambda m, i, x: i < m.positions.shape[0]), 4),
}


def loops(module: fx.GraphModule) -> int:
    return sum(is_loop(node) for node in module.graph.nodes)


@ROUTES
@pytest.mark.parametrize(("body", "count"), LOOPS.values(), ids=LOOPS)
def test_every_iteration_has_its_additions(body: Body, count: int, route: str) -> None:
    torch.manual_seed(0)
    module = trace(body, route=route)
    assert not loops(module)
    found = find_streams(module.graph)
    assert not found.refusals
    (stream,) = found.streams
    assert len(stream.sublayers) == count
    assert {module_path(addition.node) for addition in stream.additions} == {""}


@pytest.mark.parametrize("body", [body for body, _ in LOOPS.values()], ids=LOOPS)
def test_the_values_are_the_same(body: Body) -> None:
    torch.manual_seed(0)
    model, x = Branches(body), torch.randn(2, 4, WIDTH)
    model.memory.normal_()
    program = torch.export.export(model, (x,), strict=False)
    module = program.graph_module
    with module._set_replace_hook(program.graph_signature.get_replace_hook()):
        unroll_exported(module, program)
    assert not loops(module)
    ours, theirs = tree_leaves(program.module()(x)), tree_leaves(model(x))
    assert len(ours) == len(theirs)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_loop_on_the_meta_device() -> None:
    """Its counter is where the weights are, and nobody can read it there."""
    for start in (
        lambda m, x: torch.zeros((), device=x.device),
        lambda m, x: torch.tensor(0).to(x.device),
        lambda m, x: x.new_zeros(()),
        lambda m, x: torch.zeros((), device="meta"),
    ):
        model = Branches(counting(start, lambda m, i, x: i < 3)).to("meta")
        module = trace(model, torch.empty(2, 4, WIDTH, device="meta"), route="dynamo")
        assert not loops(module)


RECURRENCES: dict[str, tuple[Body, str]] = {
    "over the inputs": (over(lambda m, x: x.transpose(0, 1).sum((1, 2))), "runs over a dimension"),
    "over the inputs and weights": (
        beside(lambda m, x: x.transpose(0, 1)[:3]),
        "runs over a dimension",
    ),
    "until a value": (counting(zero, lambda m, i, x: x.sum() < 9), "takes a number of iterations"),
    "from an input": (
        counting(lambda m, x: x.sum().long(), lambda m, i, x: i < 3),
        "depends on an input",
    ),
    "from chance": (
        counting(lambda m, x: torch.randint(3, ()), lambda m, i, x: i < 3),
        "depends on the result of 'randint'",
    ),
    "from memory as it was": (
        counting(lambda m, x: torch.empty((), dtype=torch.long), lambda m, i, x: i < 3),
        "depends on the result of 'empty'",
    ),
    "from several numbers": (
        counting(lambda m, x: torch.zeros(2), lambda m, i, x: (i < 3).all()),
        "depends on the result of 'zeros', which is not one number",
    ),
    "up to a buffer's value": (
        counting(zero, lambda m, i, x: i < m.memory[0, 0] + 3),
        "takes a number of iterations",
    ),
    "from a number that is added to": (written(lambda i: i.add_(1)), "is written in place"),
    "from a number that is filled": (written(lambda i: i.fill_(1)), "is written in place"),
    "from a number that is set": (written(first_is_one, (1,)), "is written in place"),
    "from a number that a view changes": (
        written(lambda i: i.view(()).add_(1)),
        "is written in place",
    ),
    "from a number that is an output": (
        written(lambda i: torch.add(i, 1, out=i)),
        "is written in place",
    ),
    "for ever": (
        counting(zero, lambda m, i, x: i >= 0),
        f"takes more than {MOST_TRIPS} iterations",
    ),
}


@ROUTES
@pytest.mark.parametrize(("body", "reason"), RECURRENCES.values(), ids=RECURRENCES)
def test_a_loop_of_unknown_depth_stays_and_says_why(body: Body, reason: str, route: str) -> None:
    module = trace(body, route=route)
    assert loops(module) == 1
    found = find_streams(module.graph)
    assert not found.streams
    (refusal,) = found.refusals
    assert refusal.kind == "inner-graph"
    assert reason in refusal.reason


def apart(m: Any, x: Tensor) -> Tensor:
    """Every iteration runs a stream of its own; what it carries is a sum."""

    def turn(total: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        own = step(step(x, weight), weight)
        return total + own.sum(), own

    return scan(turn, x.sum(), stacked(m))[0]


def sums(m: Any, x: Tensor) -> Tensor:
    """A recurrence whose steps do not depend on the state: no residual addition."""

    def turn(state: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        state = state + value
        return state, state.sum()

    return scan(turn, x[0], m.positions)[0]


def around_a_constant(m: Any, x: Tensor) -> Tensor:
    """A fixed point: every iteration starts anew, and nothing adds up."""

    def turn(state: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        state = x + torch.tanh(F.layer_norm(state, (WIDTH,)) @ weight)
        return state, state.sum()

    return scan(turn, torch.zeros_like(x), stacked(m))[0]


def pairs(xs: Callable[[Any, Tensor], Tensor]) -> Body:
    """Adds the branch of the iteration before: one body alone shows no residual addition."""

    def body(m: Any, x: Tensor) -> Any:
        def turn(state: tuple[Tensor, Tensor], each: Tensor) -> Any:
            total = state[0] + state[1]
            branch = torch.tanh(F.layer_norm(total, (WIDTH,)) @ (m.f.weight + each.mean()))
            return (branch, total), total.sum()

        return scan(turn, (x, torch.zeros_like(x)), xs(m, x))[0]

    return body


@ROUTES
def test_an_addition_that_shows_from_one_iteration_to_the_next(route: str) -> None:
    (stream,) = find_streams(trace(pairs(lambda m, x: stacked(m)), route=route).graph).streams
    assert len(stream.additions) == 2  # the first one adds to zeros
    module = trace(pairs(lambda m, x: x.transpose(0, 1)), route=route)
    assert loops(module) == 1
    (refusal,) = find_streams(module.graph).refusals
    assert "runs over a dimension of the inputs" in refusal.reason


def test_a_loop_that_never_runs_adds_nothing() -> None:
    module = trace(counting(zero, lambda m, i, x: i < 0), route="dynamo")
    assert loops(module) == 1
    found = find_streams(module.graph)
    assert not found.streams
    assert not found.refusals


@ROUTES
def test_a_loop_that_carries_no_stream_stays(route: str) -> None:
    module = trace(apart, route=route)
    assert loops(module) == 1
    reasons = [refusal.reason for refusal in find_streams(module.graph).refusals]
    assert len(reasons) == 2
    assert all("carries no stream from one iteration to the next" in reason for reason in reasons)
    assert loops(trace(around_a_constant, route=route)) == 1
    module = trace(sums, route=route)
    assert loops(module) == 1
    assert not find_streams(module.graph).refusals


def test_a_loop_in_a_loop() -> None:
    """PyTorch itself takes no gradients of it, as capture by Dynamo would."""
    (stream,) = find_streams(trace(nested, route="export").graph).streams
    assert len(stream.sublayers) == 6


def test_a_checkpointed_loop_stays_in_its_region() -> None:
    def around(m: Any, x: Tensor) -> Any:
        return checkpoint(over(lambda m, x: stacked(m)), m, x, use_reentrant=False)

    (stream,) = find_streams(trace(around, route="dynamo").graph).streams
    assert len(stream.sublayers) == 3
    assert {a.node.meta[REGION].index for a in stream.additions} == {0}


def test_post_norm_iterations_are_delta_streams() -> None:
    def body(m: Any, x: Tensor) -> Any:
        def turn(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            x = F.layer_norm(step(x, weight), (WIDTH,))
            return x, x.sum()

        return scan(turn, x, stacked(m))

    graph = trace(body, route="dynamo").graph
    assert not find_streams(graph).streams
    (stream,) = find_streams(graph, delta_sources=True).streams
    assert len(stream.sublayers) == 3
