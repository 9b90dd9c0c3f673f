"""Which additions are residual additions: each rule with an example and its negative twin.

Bodies are functions of layers ``m`` and a stream ``x`` (and ``y``); ``m.f(x)`` is a linear layer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from passes_helpers import (
    ROUTES,
    Body,
    analyse,
    depths,
    pre_norm,
    site_depths,
    sublayers,
    tokens,
    twice,
)


@pytest.mark.parametrize("route", ROUTES)
def test_a_pre_norm_layer_is_one_stream(route: str) -> None:
    found = analyse(pre_norm, route=route)
    assert depths(found) == [2]
    assert sublayers(found) == [(1, 1)]
    assert site_depths(found) == [(0, 1, 2)]
    assert not found.refusals


# Both operands, every spelling.

SPELLINGS = {
    "skip left": lambda m, x: x + m.f(x),
    "skip right": lambda m, x: m.f(x) + x,
    "torch.add": lambda m, x: torch.add(x, m.f(x)),
    "keywords": lambda m, x: torch.add(input=x, other=m.f(x)),
    "method": lambda m, x: x.add(m.f(x)),
    "alpha on the branch": lambda m, x: torch.add(x, m.f(x), alpha=0.5),
    "alpha of one on the skip": lambda m, x: torch.add(m.f(x), x, alpha=1),
    "subtracted branch": lambda m, x: x - m.f(x),
    "subtracted method": lambda m, x: x.sub(m.f(x), alpha=2),
    "addcmul": lambda m, x: torch.addcmul(x, m.f(x), m.scale, value=0.5),
    "addcmul, factors swapped": lambda m, x: torch.addcmul(x, m.scale, m.f(x)),
    "half a branch": lambda m, x: 0.5 * m.f(x) + x,
    "gated branch": lambda m, x: x + torch.sigmoid(m.g(x)) * m.f(x),
}


@pytest.mark.parametrize("step", SPELLINGS.values(), ids=SPELLINGS)
def test_spellings_of_a_residual_addition(step: Body) -> None:
    found = analyse(twice(step))
    assert depths(found) == [2]
    assert not found.refusals


NO_SPELLINGS = {
    "alpha on the skip": lambda m, x: torch.add(m.f(x), x, alpha=0.5),
    "negated skip": lambda m, x: m.f(x) - x,
    "addcmul of the state": lambda m, x: torch.addcmul(m.f(x), x, m.scale),
    "no addition": lambda m, x: x * m.f(x),
    "concatenation": lambda m, x: m.f(torch.cat((x[..., :4], m.f(x)[..., 4:]), -1)),
    "highway": lambda m, x: torch.lerp(x, m.f(x), torch.sigmoid(m.g(x))),
}


@pytest.mark.parametrize("step", NO_SPELLINGS.values(), ids=NO_SPELLINGS)
def test_what_is_no_residual_addition(step: Body) -> None:
    assert depths(analyse(twice(step))) == []


@pytest.mark.parametrize("route", ROUTES)
def test_in_place_additions(route: str) -> None:
    def operator(m: Any, x: Tensor) -> Tensor:
        x = m.h(x)
        x += m.f(m.norm(x))
        x += m.g(m.norm(x))
        return m.norm(x)

    def method(m: Any, x: Tensor) -> Tensor:
        x = m.h(x)
        x.add_(m.f(m.norm(x)))
        x.add_(m.g(m.norm(x)), alpha=0.5)
        return m.norm(x)

    def branch_overwritten(m: Any, x: Tensor) -> Tensor:
        for layer in (m.f, m.g):
            y = layer(m.norm(x))
            y += x
            x = y
        return x

    for body in (operator, method, branch_overwritten):
        found = analyse(body, route=route)
        assert depths(found) == [2]
        assert site_depths(found) == [(0, 1, 2)]


# The branch has to depend on the stream, through something that is not element-wise.

MIXERS = {
    "pooling": lambda m, x: x + (F.avg_pool1d(x, 3, 1, 1) - x),
    "cumulative sum": lambda m, x: x + x.cumsum(1),
    "shift": lambda m, x: x + torch.roll(x, 1, 1),
    "norm": lambda m, x: x + m.norm(x),
    "Fourier transform": lambda m, x: x + torch.fft.fft(x).real,
    "attention": lambda m, x: x + (x @ x.mT).softmax(-1) @ x,
    "detached branch input": lambda m, x: x + m.f(x.detach()),
}


@pytest.mark.parametrize("step", MIXERS.values(), ids=MIXERS)
def test_mixers_without_weights_are_branches(step: Body) -> None:
    assert depths(analyse(twice(step))) == [2]


ELEMENTWISE = {
    "polynomial": lambda m, x: x + 0.044715 * torch.pow(x, 3),
    "itself": lambda m, x: x + x,
    "activation": lambda m, x: x + torch.tanh(m.scale * x),
    "constant": lambda m, x: x + 1.0,
    "bias": lambda m, x: x + m.scale,
    "positions": lambda m, x: x + m.positions,
    "positions through a layer": lambda m, x: x + m.f(m.positions),
    "dropout": lambda m, x: x + F.dropout(x, 0.5),
    "shape": lambda m, x: x + m.f(torch.zeros_like(x)),
}


@pytest.mark.parametrize("step", ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_distractors_are_neither_found_nor_refused(step: Body) -> None:
    found = analyse(twice(step))
    assert depths(found) == []
    assert not found.refusals


def test_distractors_inside_branches_change_nothing() -> None:
    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(0.797884 * (x + 0.044715 * torch.pow(x, 3))))

    def rotate(x: Tensor, m: Any) -> Tensor:
        left, right = x.chunk(2, -1)
        return x * m.scale + torch.cat((-right, left), -1) * m.scale

    def lora(m: Any, x: Tensor) -> Tensor:
        return m.f(x) + m.h(m.g(x))

    def body(m: Any, x: Tensor) -> Tensor:
        x = x + m.positions
        n = m.norm(x)
        scores = rotate(m.f(n), m) @ rotate(m.g(n), m).transpose(1, 2) + m.positions[:, :4]
        x = x + scores.softmax(-1) @ lora(m, n)
        return x + (m.h(gelu(lora(m, m.norm(x)))) + m.scale)

    found = analyse(body)
    assert depths(found) == [2]
    assert site_depths(found) == [(0, 1, 2)]
    assert not found.refusals


def test_a_state_space_scan_is_no_stream() -> None:
    def scan(m: Any, x: Tensor) -> Tensor:
        state = m.f(x[:, 0])
        outputs = []
        for step in range(4):
            state = state * m.scale + m.g(x[:, step])
            outputs.append(state)
        return torch.stack(outputs, 1)

    alone = analyse(scan)
    assert depths(alone) == []
    assert not alone.refusals
    inside = analyse(twice(lambda m, x: x + scan(m, m.norm(x))))
    assert depths(inside) == [2]
    assert not inside.refusals


def test_a_sum_over_values_independent_of_the_stream() -> None:
    def independent(m: Any, x: Tensor, y: Tensor) -> Tensor:
        x = x + m.f(y)
        return x + m.g(y)

    def dependent(m: Any, x: Tensor, y: Tensor) -> Tensor:
        x = x + m.f(x * y)
        return x + m.g(x * y)

    assert depths(analyse(independent, tokens(), tokens())) == []
    assert depths(analyse(dependent, tokens(), tokens())) == [2]


def test_an_integer_or_one_dimensional_sum_is_no_stream() -> None:
    def integers(m: Any, x: Tensor) -> Tensor:
        counts = (x > 0).long()
        counts = counts + counts.cumsum(1)
        return counts + counts.cumsum(1)

    def vector(m: Any, x: Tensor) -> Tensor:
        x = x[0, 0]
        x = x + m.f(x)
        return x + m.g(x)

    assert depths(analyse(integers)) == []
    assert depths(analyse(vector)) == []


# Sublayers: maximal runs of additions with no read between.


def test_parallel_additions_are_one_sublayer() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        for _ in range(2):
            n = m.norm(x)
            x = x + m.f(n) + m.g(n)
        return x

    found = analyse(body)
    assert sublayers(found) == [(2, 2)]
    assert site_depths(found) == [(0, 2, 4)]


def test_a_read_between_makes_two_sublayers() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + m.f(m.norm(x))
            x = x + m.g(m.norm(x))
        return x

    assert sublayers(analyse(body)) == [(1, 1, 1, 1)]


def test_branches_summed_first_are_one_addition() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        for _ in range(2):
            n = m.norm(x)
            x = x + (m.f(n) + m.g(n))
        return x

    found = analyse(body)
    assert sublayers(found) == [(1, 1)]
    assert not found.refusals


def test_a_mid_chain_addition_that_does_not_depend_on_the_stream_is_absorbed() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x = x + m.f(x)
        x = x + m.positions
        return x + m.g(x)

    found = analyse(body)
    (stream,) = found.streams
    assert [state.addition.is_residual for state in stream.states if state.addition] == [
        True,
        False,
        True,
    ]
    assert depths(found) == [2]
    assert site_depths(found) == [(0, 1, 2)]
    assert stream.states[1].reads == ()


def test_an_addition_before_the_first_branch_belongs_to_the_root() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x = x + m.positions
        x = x + m.f(x)
        return x + m.g(x)

    (stream,) = analyse(body).streams
    assert len(stream.states) == 3


def absorbed(found: Any) -> list[bool]:
    """Of the additions of the first stream: which of them are absorbed."""
    return [not addition.is_residual for addition in found.streams[0].chain]


WITH_THE_TIME: dict[str, Body] = {
    "before the branch": lambda m, x, t: x + t + m.f(m.norm(x)),
    "on the left": lambda m, x, t: t + x + m.f(m.norm(x)),
    "branch on the left": lambda m, x, t: m.f(m.norm(x)) + (x + t),
    "read by the branch too": lambda m, x, t: x + t + m.f(m.norm(x) + m.g(t)),
    "a layer of it": lambda m, x, t: x + m.g(t) + m.f(m.norm(x)),
}


@pytest.mark.parametrize("time", [tokens(), tokens()[:, :1]], ids=["whole", "broadcast"])
@pytest.mark.parametrize("step", WITH_THE_TIME.values(), ids=WITH_THE_TIME)
def test_what_is_added_together_with_each_branch_is_absorbed(step: Body, time: Tensor) -> None:
    found = analyse(lambda m, x, t: step(m, step(m, step(m, x, t), t), t), tokens(), time)
    assert absorbed(found) == [True, False] * 3
    assert found.streams[0].chain[0].previous.op == "placeholder"
    assert site_depths(found) == [(0, 1, 2, 3)]
    assert not found.refusals


def test_two_things_that_are_added_together_with_each_branch() -> None:
    def body(m: Any, x: Tensor, t: Tensor) -> Tensor:
        for f in (m.f, m.g):
            x = x + t + m.positions + f(m.norm(x))
        return x

    assert absorbed(analyse(body, tokens(), tokens()[:, :1])) == [True, True, False] * 2


def test_what_the_branch_reads_as_well_belongs_to_the_root() -> None:
    def body(m: Any, x: Tensor, t: Tensor) -> Tensor:
        for f in (m.f, m.g):
            x = x + t
            x = x + f(m.norm(x))
        return x

    found = analyse(body, tokens(), tokens()[:, :1])
    assert absorbed(found) == [False, True, False]
    assert found.streams[0].chain[0].previous.op != "placeholder"


@pytest.mark.parametrize(
    "step",
    [lambda m, x, t: x + t + m.f(m.norm(t)), lambda m, x, t: x + t + m.scale * x],
    ids=["branch of the side alone", "element-wise"],
)
def test_a_side_addition_without_a_branch_of_the_chain_is_none(step: Body) -> None:
    found = analyse(lambda m, x, t: step(m, step(m, x, t), t), tokens(), tokens()[:, :1])
    assert not found.streams
    assert not found.refusals


def test_a_skip_around_a_stream_is_no_side_addition() -> None:
    """What an inner stream starts from depends on the value that is added after it."""

    def body(m: Any, x: Tensor) -> Tensor:
        for _ in range(2):
            y = m.h(x)
            for f in (m.f, m.g):
                y = y + f(y)
            x = x + y
        return x

    assert depths(analyse(body)) == [2, 2, 2]


def test_additions_that_nothing_reads_are_left_out() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        first = x + m.f(x)
        last = first + m.g(first)
        unread = last + m.h(last)
        assert unread is not None
        return last

    found = analyse(body)
    assert depths(found) == [2]
    assert site_depths(found) == [(0, 1, 2)]
