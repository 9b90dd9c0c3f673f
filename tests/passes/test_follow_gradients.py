"""Which values a gradient comes back to, in tiny graphs, beside what autograd says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnres_compile.passes.dataflow import Dataflow
from attnres_compile.passes.follow_gradients import nodes_with_gradients
from passes_helpers import Body, Branches, tokens, trace


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
