"""Mixes under no_grad beside mixes that are trained: no gradient is lost, none appears."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._dynamo.backends.debugging import aot_eager

from attnres_compile.functional import attnres
from attnres_compile.passes.fuse_neighbours import fuse_neighbours
from attnres_compile.passes.gradient_modes import gradient_modes
from attnres_compile.passes.schedule_two_phase import schedule_two_phase
from schedule_helpers import WIDTH, Tensors, assert_unchanged_values, count, sites, tensors
from tolerances import relative_error


def schedule_and_fuse(graph: fx.Graph) -> None:
    schedule_two_phase(graph)
    fuse_neighbours(graph)


def addition(t: Tensors, records: bool) -> Tensor:
    total = t["root"] + t["branch0"]
    with torch.set_grad_enabled(records):
        mixed = attnres([t["root"], total], t["query0"])
    return total * t["branch0"] + mixed


def addition_inside(t: Tensors, records: bool) -> Tensor:
    with torch.set_grad_enabled(records):
        total = torch.sin(t["root"]) + torch.sin(t["branch0"])
    return attnres([t["root"], total], t["query0"])


def norm(t: Tensors, records: bool) -> Tensor:
    with torch.set_grad_enabled(records):
        mixed = attnres([t["root"], t["branch0"]], t["query0"])
    return F.rms_norm(mixed, (WIDTH,), t["weight0"]) * t["root"]


def norm_inside(t: Tensors, records: bool) -> Tensor:
    mixed = attnres([t["root"], t["branch0"]], t["query0"])
    with torch.set_grad_enabled(records):
        normed = F.rms_norm(mixed, (WIDTH,), t["weight0"])
    return torch.sin(mixed) * normed


def weight(t: Tensors, records: bool) -> Tensor:
    mixed = attnres([t["root"], t["branch0"]], t["query0"])
    with torch.set_grad_enabled(records):
        scale = 1 + t["weight0"]
    return F.rms_norm(mixed, (WIDTH,), scale)


BESIDE = {f.__name__: f for f in (addition, addition_inside, norm, norm_inside, weight)}


@pytest.mark.parametrize("body", BESIDE.values(), ids=BESIDE)
def test_what_stands_in_another_mode_is_not_fused(body: Callable[..., Tensor]) -> None:
    def fused(records: bool) -> bool:
        graph = assert_unchanged_values(lambda t: body(t, records), tensors(1), schedule_and_fuse)
        (site,) = sites(graph)
        return len(site.kwargs["addends"]) == 2 or site.kwargs["norm"] != "none"

    assert fused(True)
    assert not fused(False)


def stream(t: Tensors, records: bool) -> Tensor:
    """Two sites of a block, and between them the same mix again."""
    sources = [t["root"], *(torch.tanh(t[f"branch{i}"]) for i in range(3))]
    partial = torch.tanh(2 * t["branch3"])
    first = attnres([*sources, partial], t["query0"])
    partial = partial + torch.tanh(first)
    with torch.set_grad_enabled(records):
        between = attnres([*sources, partial], t["query1"])
    second = attnres([*sources, partial + torch.tanh(between)], t["query2"])
    return first + between * second


def found_inside(t: Tensors, records: bool) -> Tensor:
    """A source that is completed where nothing is recorded, of sites whose queries are trained."""
    with torch.set_grad_enabled(records):
        start = torch.sin(t["root"]) + torch.sin(t["branch0"])
    sources = [start, torch.tanh(t["branch1"]), torch.tanh(t["branch2"])]
    first = attnres([*sources, t["branch3"]], t["query0"], t["gain0"])
    second = attnres([*sources, t["branch3"] + torch.tanh(first)], t["query1"], t["gain1"])
    return first * second


def query_inside(t: Tensors, records: bool) -> Tensor:
    sources = [torch.sin(t["root"]), t["branch0"], t["branch1"]]
    with torch.set_grad_enabled(records):
        query = 2 * t["query0"]
    first = attnres([*sources, t["branch2"]], query)
    return first * attnres([*sources, t["branch2"] + torch.tanh(first)], t["query1"])


def query_between(t: Tensors, records: bool) -> Tensor:
    sources = [torch.sin(t["root"]), t["branch0"], t["branch1"]]
    first = attnres([*sources, t["branch2"]], t["query0"])
    with torch.set_grad_enabled(records):
        query = 2 * t["query1"]
    return first * attnres([*sources, t["branch2"] + torch.tanh(first)], query)


def query_at_the_start(t: Tensors, records: bool) -> Tensor:
    with torch.set_grad_enabled(records):
        query = 2 * t["query0"]
    sources = [t["root"], t["branch0"], t["branch1"]]
    first = attnres([*sources, t["branch2"]], query)
    return first * attnres([*sources, t["branch2"] + torch.tanh(first)], t["query1"])


def query_after_a_start(t: Tensors, records: bool) -> Tensor:
    with torch.set_grad_enabled(records):
        torch.sin(t["root"])
    query = 2 * t["query0"]
    sources = [t["root"], t["branch0"], t["branch1"]]
    first = attnres([*sources, t["branch2"]], query)
    return first * attnres([*sources, t["branch2"] + torch.tanh(first)], t["query1"])


BLOCKS = {
    "stream": (stream, 1),
    "found inside": (found_inside, 1),
    "query": (query_inside, 1),
    "query between": (query_between, 0),
    "query after a start": (query_after_a_start, 1),
}


@pytest.mark.parametrize(("body", "blocks"), BLOCKS.values(), ids=BLOCKS)
def test_blocks_share_only_what_has_the_same_gradients(
    body: Callable[..., Tensor], blocks: int
) -> None:
    def graph_of(records: bool) -> fx.Graph:
        return assert_unchanged_values(lambda t: body(t, records), tensors(4), schedule_and_fuse)

    assert count(graph_of(True), "phase1") == 1
    assert count(graph_of(False), "phase1") == blocks


def test_a_query_made_without_gradients_where_the_graph_begins() -> None:
    assert_unchanged_values(lambda t: query_at_the_start(t, False), tensors(3), schedule_and_fuse)


def recorded(t: Tensors) -> Tensor:
    with torch.enable_grad():
        sources = [t["root"], t["branch0"], t["branch1"]]
        first = attnres([*sources, t["branch2"]], t["query0"], t["gain0"])
        return first * attnres([*sources, t["branch2"] + torch.tanh(first)], t["query1"])


def test_mixes_that_are_recorded_within_a_call_that_is_not() -> None:
    def backend(module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        schedule_and_fuse(module.graph)
        module.recompile()
        return aot_eager(module, inputs)  # type: ignore[no-any-return]

    torch._dynamo.reset()
    given = tensors(3)
    with torch.no_grad():
        found = torch.compile(recorded, backend=backend, fullgraph=True)(given)
    leaves = [given[name] for name in ("root", "branch2", "query0", "gain0", "query1")]
    gradients = torch.autograd.grad(found.sum(), leaves)
    expected = torch.autograd.grad(recorded(given).sum(), leaves)
    for one, other in zip(gradients, expected, strict=True):
        assert relative_error(one, other) < 1e-10


def modes_of(body: Callable[[Tensor], Tensor], at_start: bool) -> dict[str, tuple[bool, bool]]:
    """Of the methods that a function calls: whether gradients are recorded, and inference runs."""
    graphs: list[fx.Graph] = []

    def backend(module: fx.GraphModule, _: list[Tensor]) -> fx.GraphModule:
        graphs.append(module.graph)
        return module

    torch._dynamo.reset()
    with torch.set_grad_enabled(at_start):
        torch.compile(body, backend=backend, fullgraph=True)(torch.ones(3))
    modes = gradient_modes(graphs[0].nodes, at_start=at_start)
    called = [node for node in graphs[0].nodes if node.op == "call_method"]
    return {str(node.target): (modes[node].records, modes[node].infers) for node in called}


def nested(x: Tensor) -> Tensor:
    x = x.sin()
    with torch.no_grad():
        x = x.cos()
        with torch.enable_grad():
            return x.tanh()


def inferring(x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = x.sin()
    return x.cos() * y


def for_good(x: Tensor) -> Tensor:
    x = x.sin()
    torch.set_grad_enabled(False)
    return x.cos()


def not_inferring(x: Tensor) -> Tensor:
    x = x.sin()
    with torch.inference_mode(False):
        return x.cos()


ON, OFF, INFERRING = (True, False), (False, False), (False, True)


def test_modes() -> None:
    assert modes_of(nested, True) == {"sin": ON, "cos": OFF, "tanh": ON}
    assert modes_of(nested, False) == {"sin": OFF, "cos": OFF, "tanh": ON}
    assert modes_of(inferring, True) == {"sin": INFERRING, "cos": ON}
    assert modes_of(not_inferring, False) == {"sin": OFF, "cos": ON}
    assert modes_of(for_good, True) == {"sin": ON, "cos": OFF}
    assert torch.is_grad_enabled()
