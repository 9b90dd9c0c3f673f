"""Which slices of a concatenation are one of its parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from attnres_compile.passes.concatenations import concatenated_part
from attnres_compile.passes.dataflow import Dataflow, Reads
from passes_helpers import Body, analyse, depths, images, refused, site_depths, tokens, trace


def joined(m: Any, x: Tensor, dim: int = -1) -> Tensor:
    """Of widths 8, 8 and 8."""
    return torch.cat([m.f(x), m.g(x), m.h(x)], dim)


PARTS: dict[str, tuple[Body, str]] = {
    "first": (lambda m, x: joined(m, x)[..., :8], "f"),
    "middle": (lambda m, x: joined(m, x)[:, :, 8:16], "g"),
    "last": (lambda m, x: joined(m, x)[..., -8:], "h"),
    "narrow": (lambda m, x: joined(m, x).narrow(2, 8, 8), "g"),
    "narrow of torch": (lambda m, x: torch.narrow(joined(m, x), 2, 8, 8), "g"),
    "two slices": (lambda m, x: joined(m, x)[..., 8:][..., :8], "g"),
    "of another dimension": (lambda m, x: joined(m, x, 1)[:, 4:8], "g"),
    "of the batch": (lambda m, x: joined(m, x, 0)[2:4], "g"),
}
NO_PARTS: dict[str, Body] = {
    "less": lambda m, x: joined(m, x)[..., :7],
    "shifted": lambda m, x: joined(m, x)[..., 1:9],
    "two parts": lambda m, x: joined(m, x)[..., :16],
    "every second": lambda m, x: joined(m, x)[..., ::3],
    "cut elsewhere": lambda m, x: joined(m, x)[:, 1:, :8],
    "other order": lambda m, x: joined(m, x, 0)[[1, 0]],
    "another type": lambda m, x: torch.cat([m.f(x), m.g(x).double()], -1)[..., :8],
    "turned": lambda m, x: joined(m, x).transpose(0, 1)[..., :8],
    "no concatenation": lambda m, x: m.f(x)[..., :8],
    "the concatenation": lambda m, x: joined(m, x),
}
ROUTES = ("symbolic", "dynamo", "export")


def result(body: Body, route: str = "symbolic") -> fx.Node:
    graph = trace(body, route=route).graph
    (value,) = graph.output_node().args
    while isinstance(value, tuple | list):
        (value,) = value
    assert isinstance(value, fx.Node)
    return value


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("body", "part"), PARTS.values(), ids=PARTS)
def test_slices_that_are_a_part(body: Body, part: str, route: str) -> None:
    found = concatenated_part(result(body, route))
    assert found is not None
    order = [node for node in found[-1].graph.nodes if node in found[-2].args[0]]
    assert order.index(found[-1]) == "fgh".index(part)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("start", "part"), [(0, "f"), (4, "g"), (2, None)])
def test_a_part_behind_an_empty_one(start: int, part: str | None, route: str) -> None:
    """Caches start as ``torch.tensor([])``, of one dimension whatever it is joined with."""

    def body(m: Any, x: Tensor) -> Tensor:
        return torch.cat([m.scale[:0], m.f(x), m.g(x)], 1)[:, start : start + 4]

    found = concatenated_part(result(body, route))
    if part is None:
        assert found is None
    else:
        assert found is not None
        order = [node for node in found[-1].graph.nodes if node in found[-2].args[0]]
        assert order.index(found[-1]) == "-fg".index(part)


def test_all_results_of_one_operator() -> None:
    """A symbolic trace does not take them apart, so that no part has a node of its own."""

    def body(m: Any, x: Tensor) -> Tensor:
        return torch.cat(torch.chunk(m.f(x), 2, 1), 1)[:, :2]

    assert concatenated_part(result(body)) is None


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("body", NO_PARTS.values(), ids=NO_PARTS)
def test_slices_that_are_none(body: Body, route: str) -> None:
    assert concatenated_part(result(body, route)) is None


@pytest.mark.parametrize("route", ["dynamo", "export"])
def test_sizes_that_only_the_data_tells(route: str) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        some = torch.nonzero(x[0, :, 0] > 0)[:, 0]
        return torch.cat([x[:, some], m.f(x)], 1)[:, :2]

    assert concatenated_part(result(body, route)) is None


def test_a_part_is_a_copy() -> None:
    """What is written into the concatenation is in its slices; what into a part later is not."""

    def into_whole(m: Any, x: Tensor) -> Tensor:
        whole = joined(m, x)
        torch.relu_(whole)
        return whole[..., :8].sum()

    def into_part(m: Any, x: Tensor) -> Tensor:
        part = m.f(x)
        whole = torch.cat([part, m.g(x)], -1)
        torch.relu_(part)
        return whole[..., :8].sum()

    for body, name in ((into_whole, "relu_"), (into_part, "f")):
        view = Dataflow.of(trace(body).graph)
        nodes = {node.name: node for node in view.order}
        found = Reads(view).value_read(nodes["getitem"], nodes["sum_1"])
        assert found is nodes[name]


def dual_path(m: Any, x: Tensor) -> Tensor:
    """Two blocks whose skip is what was put together with something else."""
    dense = torch.tanh(x)
    for _ in range(2):
        x = torch.cat([x, dense], 1)
        x = x[:, :8] + m.conv(x[:, :8] * x[:, 8:])
    return x


@pytest.mark.parametrize("route", ROUTES)
def test_a_carrier_that_is_put_together_with_another(route: str) -> None:
    found = analyse(dual_path, images(), route=route)
    assert (depths(found), site_depths(found)) == ([2], [(0, 1, 2)])
    assert not found.refusals


def test_a_carrier_of_which_other_elements_are_taken() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.cat([x[:, :8] + m.conv(x[:, :8]), x[:, :8]], 1)[:, 1:]
        return x

    found = analyse(body, images())
    assert (depths(found), refused(found)) == ([], ["rearranged-carrier"] * 2)


def test_a_concatenation_that_is_written_into() -> None:
    """An activation in place, of which the skip is a slice, is in the carrier."""

    def body(m: Any, x: Tensor) -> Tensor:
        for _ in range(2):
            both = torch.cat([x, torch.tanh(x)], 1)
            torch.relu_(both)
            x = both[:, :8] + m.conv(both[:, :8])
        return x

    found = analyse(body, images())
    assert (depths(found), len(found.refusals)) == ([], 2)


def test_tokens_put_before_others() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        first = m.positions.expand(2, 4, 8)
        for layer in (m.f, m.g):
            both = torch.cat([first, x], 1)
            x = both[:, 4:] + layer(both)[:, 4:]
        return x

    assert depths(analyse(body, tokens())) == [2]
