"""Which values a gradient comes back to, in tiny graphs, beside what autograd says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnres_compile
from attnres_compile import AttnResConfig
from attnres_compile.passes.dataflow import Dataflow
from attnres_compile.passes.follow_gradients import nodes_with_gradients
from passes_helpers import Body, Branches, tokens, trace, twice


def plain(m: Any, x: Tensor) -> Tensor:
    return m.g(m.f(x).tanh())


def dead(m: Any, x: Tensor) -> Tensor:
    m.f(x).relu().sum()
    return m.g(x)


def detached(m: Any, x: Tensor) -> Tensor:
    return m.g(x) + m.f(x).detach()


def compared(m: Any, x: Tensor) -> Tensor:
    return m.g(x) * (m.f(x) > 0)


def chosen(m: Any, x: Tensor) -> Tensor:
    return m.g(x).gather(-1, m.f(x).topk(2).indices)


def largest(m: Any, x: Tensor) -> Tensor:
    return m.g(x)[..., :2] + m.f(x).topk(2).values


def transformed(m: Any, x: Tensor) -> Tensor:
    return m.g(torch.fft.fft(m.f(x)).real)


def written(m: Any, x: Tensor) -> Tensor:
    y = m.g(x)
    y[:, 0] = m.f(x)[:, 1]
    return y


def silenced(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.f(x)
    return m.g(x) + y


@pytest.mark.parametrize(
    ("body", "reached"),
    [
        (plain, True),
        (dead, False),
        (detached, False),
        (compared, False),
        (chosen, False),
        (largest, True),
        (transformed, True),
        (written, True),
        (silenced, False),
    ],
)
def test_what_a_gradient_comes_back_to(body: Body, reached: bool) -> None:
    model = Branches(body)
    model(tokens()).sum().backward()
    assert (model.f.weight.grad is not None) == reached
    assert model.g.weight.grad is not None
    graph = trace(model, route="dynamo").graph
    found = nodes_with_gradients(Dataflow.of(graph))
    linears = {n for n in graph.nodes if "linear" in str(n.target)}
    in_f = {node for node in linears if "_f_" in str(node.all_input_nodes)}
    assert len(linears) == 2
    assert [node in found for node in in_f] == [reached]
    assert linears - in_f <= found


def test_where_no_output_is_differentiable_every_node_counts() -> None:
    """A detector that returns classes is trained by another call."""

    def body(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = m.f(x)
        return (m.g(x) + y).argmax(-1)

    graph = trace(Branches(body), route="dynamo").graph
    found = nodes_with_gradients(Dataflow.of(graph))
    linears = [node for node in graph.nodes if "linear" in str(node.target)]
    assert [node in found for node in linears] == [False, True]


# Streams that lose their gradients on the way.


def frozen_addition(m: Any, x: Tensor) -> Tensor:
    x = m.h(x)
    x = x + m.f(m.norm(x))
    with torch.no_grad():
        x = x + m.g(m.norm(x))
    return x + m.f(m.norm(x))


def frozen_copy(m: Any, x: Tensor) -> Tensor:
    x = m.h(x)
    x = x + m.f(m.norm(x))
    with torch.no_grad():
        x = x.clone()
    return x + m.g(m.norm(x))


def frozen_sum_of_a_branch(m: Any, x: Tensor) -> Tensor:
    """What the stream starts from has no gradients, and the first branch has."""
    with torch.no_grad():
        x = m.h(x)
    branch = m.f(m.norm(x))
    with torch.no_grad():
        x = x + branch
    return x + m.g(m.norm(x))


def frozen_norm(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.h(x))
    x = x + m.f(x)
    with torch.no_grad():
        x = m.norm(x)
    return m.norm(x + m.g(x))


def frozen_start(m: Any, x: Tensor) -> Tensor:
    """Lower layers that are not trained, with all that they start from."""
    with torch.no_grad():
        x = m.h(x)
        x = x + m.f(m.norm(x))
    x = x + m.g(m.norm(x))
    return x + m.f(m.norm(x))


def frozen_root(m: Any, x: Tensor) -> Tensor:
    x = m.h(x)
    with torch.no_grad():
        x = x.clone()
    x = x + m.f(m.norm(x))
    return x + m.g(m.norm(x))


def frozen_branch(m: Any, x: Tensor) -> Tensor:
    x = m.h(x)
    x = x + m.f(m.norm(x))
    with torch.no_grad():
        branch = m.g(m.norm(x))
    return x + branch


def frozen_end(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = m.h(x)
    x = x + m.f(m.norm(x))
    y = m.norm(x)
    with torch.no_grad():
        return y, m.norm(x + m.g(m.norm(x)))


def frozen_statistic(m: Any, x: Tensor) -> Tensor:
    x = m.h(x)
    x = x + m.f(x)
    with torch.no_grad():
        size = x.std(-1, keepdim=True)
    x = x / size
    return m.norm(x + m.g(x))


CUT = [frozen_addition, frozen_copy, frozen_sum_of_a_branch]
NOT_CUT = [frozen_start, frozen_root, frozen_branch, frozen_end]


def plan_and_model(body: Body, *, delta_sources: bool) -> tuple[Any, Branches]:
    model = Branches(body).double()
    config = AttnResConfig(delta_sources=delta_sources)
    return attnres_compile.plan(model, (tokens(dtype=torch.float64),), config=config), model


def assert_same_gradients(plan: Any, model: Branches) -> None:
    inputs = (tokens(dtype=torch.float64),)
    converted = attnres_compile.convert(model, inputs, config=plan.config)
    report = attnres_compile.verify(model, converted, inputs)
    assert report.passed, str(report)
    assert any(each.kind != "output" for each in report.comparisons)


@pytest.mark.parametrize(
    ("body", "delta_sources"),
    [*((body, deltas) for body in CUT for deltas in (False, True)), (frozen_norm, True)],
)
def test_a_stream_that_loses_gradients_on_the_way_is_refused(
    body: Body, delta_sources: bool
) -> None:
    plan, _ = plan_and_model(body, delta_sources=delta_sources)
    assert not plan.streams
    (refusal,) = plan.refusals
    assert refusal.kind == "grad-mode"
    assert refusal.source.startswith("test_follow_gradients.py:")
    assert refusal.source in refusal.reason


@pytest.mark.parametrize(
    ("body", "delta_sources"),
    [*((body, deltas) for body in NOT_CUT for deltas in (False, True)), (frozen_statistic, True)],
)
def test_what_loses_no_gradients_on_the_way_keeps_them(body: Body, delta_sources: bool) -> None:
    plan, model = plan_and_model(body, delta_sources=delta_sources)
    assert plan.streams
    assert_same_gradients(plan, model)


def test_the_mode_that_a_plan_is_made_in_changes_nothing() -> None:
    with torch.no_grad():
        plan, _ = plan_and_model(frozen_addition, delta_sources=False)
    assert [refusal.kind for refusal in plan.refusals] == ["grad-mode"]


def detached_norm(m: Any, x: Tensor) -> Tensor:
    return m.norm(x + m.f(x)).detach()


@pytest.mark.parametrize("delta_sources", [False, True])
@pytest.mark.parametrize(
    "step",
    [
        detached_norm,
        lambda m, x: (x + m.f(x)).detach(),
        lambda m, x: x.detach() + m.f(x),
    ],
)
def test_a_detached_carrier_is_refused(step: Body, delta_sources: bool) -> None:
    plan, _ = plan_and_model(twice(step), delta_sources=delta_sources)
    assert not plan.streams
    assert {refusal.kind for refusal in plan.refusals} == {"detached-carrier"}
    assert "delta_sources" not in plan.refusals[0].reason


def test_what_is_detached_beside_the_carrier_keeps_gradients() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x = m.h(x).detach()
        for f in (m.f, m.g):
            x = x + f(x)
            x = x / x.detach().std(-1, keepdim=True)
        return m.norm(x)

    plan, model = plan_and_model(body, delta_sources=True)
    assert plan.num_residual_additions == 2
    assert_same_gradients(plan, model)
