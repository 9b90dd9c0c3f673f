"""What every addition is said to be, each rule with the twin that it does not hold for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnres_compile.passes.dataflow import Dataflow
from attnres_compile.passes.explain_additions import explain_additions
from attnres_compile.passes.find_streams import find_streams
from passes_helpers import ROUTES, Body, trace


def told(body: Body, route: str = "symbolic") -> list[tuple[str, str]]:
    """Verdict and rule of every addition of two tensors, in graph order."""
    graph = trace(body, route=route).graph
    found = find_streams(graph)
    explained = explain_additions(Dataflow.of(graph), found.streams, found.refusals)
    return [(each.verdict, each.rule) for each in explained.values()]


RESIDUAL = ("residual", "residual")


def pre_norm(m: Any, x: Tensor) -> Tensor:
    x = x + m.f(m.norm(x))
    return x + m.g(m.norm(x))


@pytest.mark.parametrize("route", ROUTES)
def test_a_plain_chain(route: str) -> None:
    assert told(pre_norm, route) == [RESIDUAL, RESIDUAL]


@pytest.mark.parametrize(
    ("rule", "body"),
    [
        ("independent", lambda m, x: m.f(x) + m.g(x)),
        ("independent", lambda m, x: x * m.scale + x.flip(-1) * m.scale),  # a rotary embedding
        ("element-wise", lambda m, x: (y := m.f(x)) + y.sigmoid()),
        ("element-wise", lambda m, x: x + 0.044 * x**3),
        ("shapes", lambda m, x: m.f(x).mean(-1, keepdim=True) + m.scale),
        ("shapes", lambda m, x: x + m.f(x).mean(1, keepdim=True)),
        ("subtraction", lambda m, x: x.roll(1, 1) - x),
        ("dtype", lambda m, x: (x > 0).long() + (m.f(x) > 1).long()),
        ("rank", lambda m, x: m.scale + m.f(m.scale)),
    ],
)
def test_what_is_no_residual_addition(rule: str, body: Body) -> None:
    assert told(body) == [("none", rule)]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("single-sublayer", lambda m, x: x + m.f(m.norm(x))),
        ("scaled-carrier", lambda m, x: 0.9 * x + m.f(m.norm(x))),
        ("subtracted-skip", lambda m, x: m.f(m.norm(x)) - x),
    ],
)
@pytest.mark.parametrize("route", ROUTES)
def test_what_is_refused(kind: str, body: Body, route: str) -> None:
    assert told(body, route) == [("refused", kind)]


def test_post_norm() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x = m.norm(x + m.f(x))
        x = m.norm(x + m.g(x))
        return m.h(x)

    for route in ROUTES:
        assert told(body, route) == [("refused", "post-norm")] * 2


def test_a_refusal_is_not_that_of_its_neighbours() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.f(x) + m.g(x)
        x = m.norm(x + m.f(x))
        return m.norm(x + m.g(x)) * y

    for route in ROUTES:
        assert told(body, route) == [("none", "independent"), *[("refused", "post-norm")] * 2]


def test_what_is_absorbed_and_what_is_not() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x = x + m.f(m.norm(x))
        x = x + m.positions
        return x + m.g(m.norm(x))

    def before(m: Any, x: Tensor) -> Tensor:
        return pre_norm(m, x + m.positions)

    assert told(body) == [RESIDUAL, ("absorbed", "absorbed"), RESIDUAL]
    assert told(before) == [("none", "independent"), RESIDUAL, RESIDUAL]


def test_numbers_are_no_additions_of_tensors() -> None:
    assert told(lambda m, x: torch.rsqrt(x + 1e-6)) == []
