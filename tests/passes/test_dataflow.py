"""Dependences, origins and memory in tiny graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from attnres_compile.passes import operations as ops
from attnres_compile.passes.dataflow import Dataflow, Reads
from passes_helpers import Body, tokens, trace


def view_of(body: Body, *inputs: Tensor) -> tuple[Dataflow, dict[str, fx.Node]]:
    module = trace(body, *inputs)
    return Dataflow.of(module.graph), {node.name: node for node in module.graph.nodes}


def test_an_edge_is_a_flow_of_values_not_of_shapes() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        zeros = torch.zeros_like(x)
        shaped = m.f(m.positions.expand(x.size(0), 4, 8))
        flat = torch.relu(m.g(zeros)).view_as(x)
        return shaped + flat + m.h(x)

    view, nodes = view_of(body)
    x = nodes["x"]
    assert set(view.flow.successors(x)) == {nodes["h"]}
    assert list(view.flow.predecessors(nodes["zeros_like"])) == []
    assert list(view.flow.predecessors(nodes["view_as"])) == [nodes["relu"]]


def test_order_is_topological() -> None:
    view, nodes = view_of(lambda m, x: m.f(x) + m.g(x))
    assert list(view.order.values()) == list(range(len(view.order)))
    assert all(view.order[u] < view.order[v] for u, v in view.flow.edges)
    assert view.users(nodes["x"]) == [nodes["f"], nodes["g"]]


def test_masks_tell_any_path_from_a_mixing_one() -> None:
    def body(m: Any, x: Tensor, y: Tensor) -> Tensor:
        pointwise = torch.relu(x * 2)
        mixed = m.f(pointwise)
        return mixed + y

    view, nodes = view_of(body, tokens(), tokens())
    x, y = nodes["x"], nodes["y"]
    bit, any_path, mixing_path = view.dependency_masks([x, y])
    assert bit[x] != bit[y]
    assert any_path[nodes["relu"]] == bit[x]
    assert mixing_path[nodes["relu"]] == 0
    assert mixing_path[nodes["f"]] == bit[x]
    assert any_path[nodes["add"]] == bit[x] | bit[y]
    assert mixing_path[nodes["add"]] == bit[x]  # y only ever went through an addition
    assert any_path[x] == 0  # a root does not depend on itself


def test_masks_for_one_kind_of_operation() -> None:
    view, nodes = view_of(lambda m, x: m.f(x.cumsum(1)))
    bit, _, projected = view.dependency_masks([nodes["x"]], mixes=ops.is_projection)
    assert projected[nodes["cumsum"]] == 0
    assert projected[nodes["f"]] == bit[nodes["x"]]


def test_a_write_in_place_is_an_edge_to_later_readers_of_the_same_memory() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        state = m.f(x)
        rows = state.view(-1, 8)
        before = m.g(state)
        rows.add_(m.h(rows))
        return before + m.norm(state)

    view, nodes = view_of(body)
    writer = nodes["add_"]
    assert view.memory[nodes["view"]] is nodes["f"]
    assert view.memory[writer] is nodes["f"]
    assert view.writers == {nodes["f"]: [writer]}
    assert writer in view.flow.predecessors(nodes["norm"])
    assert writer not in view.flow.predecessors(nodes["g"])
    made = nodes["f"]
    assert view.writes_between(made, start=made) == [writer]
    assert view.writes_between(made, start=made, end=nodes["g"]) == []
    assert view.writes_between(made, start=writer) == []
    assert view.writes_between(nodes["g"], start=made) == []


ORIGIN_IS_X = {
    "itself": lambda m, x: x,
    "copies": lambda m, x: x.contiguous().clone(),
    "widening casts": lambda m, x: x.double(),
    "no-op cast": lambda m, x: x.to(torch.float32),
    "reshapes": lambda m, x: x.view(-1, 8).unflatten(0, (2, 4)).unsqueeze(0),
    "transposition undone": lambda m, x: x.transpose(1, 2).permute(0, 2, 1),
    "three transpositions undone": lambda m, x: (
        x.permute(1, 2, 0).permute(1, 2, 0).permute(1, 2, 0)
    ),
    "part of a concatenation": lambda m, x: torch.cat([m.f(x), x], 1)[:, 4:].clone(),
    "part turned and back": lambda m, x: torch.cat([m.f(x), x], 1)[:, 4:].mT.transpose(1, 2),
    "cast inside a transposition": lambda m, x: x.transpose(1, 2).double().transpose(-1, -2),
}
ORIGIN_IS_NOT_X = {
    "narrowing cast": lambda m, x: x.to(torch.bfloat16),
    "there and back": lambda m, x: x.half().float(),
    "transposition": lambda m, x: x.transpose(1, 2),
    "other transposition": lambda m, x: x.transpose(1, 2).transpose(0, 1),
    "reshape between transpositions": lambda m, x: (
        x.transpose(1, 2).reshape(2, 4, 8).transpose(1, 2)
    ),
    "slice": lambda m, x: x[:, 1:],
    "part that is turned": lambda m, x: torch.cat([m.f(x), x], 1)[:, 4:].mT,
    "scaling": lambda m, x: x * 0.5,
    "dropout": lambda m, x: torch.nn.functional.dropout(x, 0.0),
    "in place": lambda m, x: x.relu_(),
}


@pytest.mark.parametrize("body", ORIGIN_IS_X.values(), ids=ORIGIN_IS_X)
def test_origin_goes_up_through_what_changes_no_value(body: Body) -> None:
    view, nodes = view_of(body)
    (result,) = nodes["output"].args
    assert isinstance(result, fx.Node)
    assert view.origin(result) is nodes["x"]


@pytest.mark.parametrize("body", ORIGIN_IS_NOT_X.values(), ids=ORIGIN_IS_NOT_X)
def test_origin_stops_where_a_value_is_made(body: Body) -> None:
    view, nodes = view_of(body)
    (result,) = nodes["output"].args
    assert isinstance(result, fx.Node)
    assert view.origin(result) is not nodes["x"]


def test_a_turn_is_seen_through_where_it_is_not_turned_once_more() -> None:
    def body(m: Any, x: Tensor) -> list[Tensor]:
        turn = x.permute(1, 2, 0)
        return [turn, turn.reshape(8, 8), turn.permute(2, 0, 1), turn.permute(1, 0, 2)]

    _, nodes = view_of(body)
    turn, reshaped, undone, turned = nodes["output"].all_input_nodes
    for node in (turn, reshaped, undone):
        assert Dataflow.path_to_origin(node, frozenset({turn}))[-1] is nodes["x"]
    assert Dataflow.path_to_origin(turned, frozenset({turn})) == [turned]
    assert Dataflow.path_to_origin(reshaped) == [reshaped, turn]


def test_reads_are_of_values_not_of_names() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        state = m.f(x)
        rows = state.view(-1, 8)
        first = m.g(rows)
        state.add_(first.view(2, 4, 8))
        return m.h(rows)

    view, nodes = view_of(body)
    reads = Reads(view)
    made, writer = nodes["f"], nodes["add_"]
    assert [read.user.name for read in reads.of(made)] == ["g", "add_"]
    assert [read.user.name for read in reads.of(writer)] == ["h"]
    assert [read.operand.name for read in reads.of(writer)] == ["view"]
    assert reads.value_read(nodes["view"], nodes["g"]) is made
    assert reads.value_read(nodes["view"], nodes["h"]) is writer


def test_a_copy_keeps_the_value_it_was_made_from() -> None:
    def early(m: Any, x: Tensor) -> Tensor:
        state = m.f(x)
        copied = state.clone()
        state.add_(m.g(state))
        return m.h(copied)

    def late(m: Any, x: Tensor) -> Tensor:
        state = m.f(x)
        state.add_(m.g(state))
        copied = state.clone()
        return m.h(copied)

    def widened(m: Any, x: Tensor) -> Tensor:
        state = m.f(x)
        copied = state.double()
        state.add_(m.g(state))
        return m.h.weight.double() @ copied.transpose(1, 2)

    for body, user, value in (
        (early, "h", "f"),
        (late, "h", "add_"),
        (widened, "transpose", "f"),
    ):
        view, nodes = view_of(body)
        reads = Reads(view)
        operand = ops.tensor_arguments(nodes[user])[-1]
        assert reads.value_read(operand, nodes[user]).name == value, body.__name__
