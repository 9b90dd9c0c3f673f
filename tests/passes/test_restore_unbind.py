"""Unpacking a tensor is one operation again; nothing else that reads its parts becomes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnres_compile import AttnResConfig, convert
from attnres_compile.passes.restore_unbind import restore_unbind
from passes_helpers import trace

Function = Callable[..., Any]


def unbinds(function: Function, rows: int = 3) -> int:
    """How often the graph of a function unbinds after the pass; values and gradients are kept."""
    x = torch.randn(rows, 4, requires_grad=True)
    module = trace(function, x, route="dynamo")
    expected = module(x)[0].sum()
    (expected_grad,) = torch.autograd.grad(expected, x)
    restore_unbind(module)
    module.graph.lint()
    actual = module(x)[0].sum()
    (actual_grad,) = torch.autograd.grad(actual, x)
    assert torch.equal(actual, expected)
    assert torch.equal(actual_grad, expected_grad)
    return sum(node.target is torch.unbind for node in module.graph.nodes)


def unpacked(_: Any, x: Tensor) -> Tensor:
    q, k, v = x.sin()
    return q * k + v


def unpacked_input(_: Any, x: Tensor) -> Tensor:
    total, k, v = x
    for _ in range(2):
        total = total * k + v
    return total


@pytest.mark.parametrize("function", [unpacked, unpacked_input])
def test_an_unpacked_tensor_is_unbound_once(function: Function) -> None:
    assert unbinds(function) == 1


def views_of_parts(_: Any, x: Tensor) -> Tensor:
    q, k, v = x.sin()
    return q.view(2, 2) @ k.view(2, 2).transpose(0, 1) + v.unflatten(0, (2, 2)).float()


def test_views_of_parts_may_be_computed_with() -> None:
    assert unbinds(views_of_parts) == 1


def without_one(_: Any, x: Tensor) -> Tensor:
    q, _, v = x.sin()
    return q * v


def another_order(_: Any, x: Tensor) -> Tensor:
    s = x.sin()
    k, q, v = s[1], s[0], s[2]
    return q * k + v


def with_work_between(_: Any, x: Tensor) -> Tensor:
    s = x.sin()
    first = s[0].tanh()
    return first * s[1] + s[2]


def twice(_: Any, x: Tensor) -> Tensor:
    s = x.sin()
    q, k, v, again = s[0], s[1], s[2], s[0]
    return q * k * v * again


def negative(_: Any, x: Tensor) -> Tensor:
    s = x.sin()
    q, k, v = s[0], s[1], s[-1]
    return q * k * v


def without_gradients_for_one(_: Any, x: Tensor) -> Tensor:
    s = x.sin()
    with torch.no_grad():
        q = s[0]
    return q * s[1] * s[2]


@pytest.mark.parametrize(
    "function", [without_one, another_order, with_work_between, twice, negative]
)
def test_other_reads_stay(function: Function) -> None:
    assert unbinds(function) == 0


def test_a_part_without_gradients_keeps_none() -> None:
    """The reads of the others would come to lie where gradients are switched off."""
    assert unbinds(without_gradients_for_one) == 0


def one_part(_: Any, x: Tensor) -> Tensor:
    return x.sin()[0].tanh()


def test_one_part_alone_is_no_unpacking() -> None:
    assert unbinds(one_part, rows=1) == 0


def the_first_two(_: Any, x: Tensor) -> Tensor:
    s = x.sin()
    q, k = s[0], s[1]
    return q * k


def test_some_parts_alone_are_no_unpacking() -> None:
    assert unbinds(the_first_two, rows=3) == 0
    assert unbinds(the_first_two, rows=2) == 1


def written_over(_: Any, x: Tensor) -> Tensor:
    s = x.sin()
    q, k, v = s[0], s[1], s[2]
    q.mul_(2.0)
    return s.sum() + k * v


@torch.library.custom_op("attnres_test::write", mutates_args={"room"})
def write(source: Tensor, room: Tensor) -> None:
    room.copy_(source)


@torch.library.register_fake("attnres_test::write")
def _(source: Tensor, room: Tensor) -> None:
    pass


def written_over_by_an_operator(_: Any, x: Tensor) -> Tensor:
    s = x.sin()
    q, k, v = s[0], s[1], s[2]
    write(x[0].detach(), v)
    return q * k


def test_what_is_written_over_stays() -> None:
    """PyTorch forbids it for what unbind returned, and the model may have read each by itself."""
    assert unbinds(written_over) == 0
    assert unbinds(written_over_by_an_operator) == 0


@pytest.mark.parametrize(
    "last",
    [
        lambda v: v,
        lambda v: v.view(2, 2),
        lambda v: F.dropout(v, 0.5, training=False),
        lambda v: torch.moveaxis(v.view(2, 2), 0, 1),
        lambda v: torch.einsum("ij->ji", v.view(2, 2)),
        lambda v: v.cpu(),
        lambda v: [+v],
        lambda v: v.chunk(2)[0],
    ],
)
def test_what_is_returned_may_be_written_over(last: Function) -> None:
    def returned(_: Any, x: Tensor) -> tuple[Tensor, Any]:
        s = x.sin()
        q, k, v = s[0], s[1], s[2]
        return q * k, last(v)

    assert unbinds(returned) == 0


class Layers(nn.Module):
    """Residual layers whose branches unpack a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 24) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            q, k, v = layer(x).unflatten(-1, (3, 8)).movedim(-2, 0)
            x = x + q.tanh() * k + v
        return x


def test_a_converted_model_that_is_not_compiled_unbinds() -> None:
    """Its gradients are stacked, as the model's own are, and not added up from zeros."""
    model, x = Layers(), torch.randn(2, 8)
    converted = convert(model, (x,), config=AttnResConfig(num_blocks=2))
    for each in (model, converted):
        with torch.profiler.profile() as profile:
            each(x).sum().backward()
        names = {event.key for event in profile.key_averages()}
        assert "UnbindBackward0" in names
        assert "aten::select_backward" not in names
