"""One vocabulary for every spelling of an operation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from attnres_compile.passes import operations as ops
from passes_helpers import ROUTES, Body, images, tokens, trace


def last(body: Body, *inputs: Any, route: str = "symbolic") -> fx.Node:
    """The node that makes the result of a function."""
    (output,) = (n for n in trace(body, *inputs, route=route).graph.nodes if n.op == "output")
    result = output.args[0]
    while isinstance(result, tuple | list):
        result = result[0]
    return result


NAMES = {
    "add": [
        lambda m, x: x + x,
        lambda m, x: torch.add(x, x),
        lambda m, x: x.add(x),
        lambda m, x: x.add_(x),
        lambda m, x: torch.ops.aten.add_.Tensor(x, x),
        lambda m, x: 1 + x,
    ],
    "sub": [lambda m, x: x - x, lambda m, x: x.sub_(x), lambda m, x: torch.sub(x, x)],
    "mul": [lambda m, x: x * x, lambda m, x: 2 * x, lambda m, x: x.mul_(2)],
    "div": [lambda m, x: x / 2, lambda m, x: torch.div(x, 2), lambda m, x: x.true_divide(2)],
    "cat": [lambda m, x: torch.cat((x, x)), lambda m, x: torch.concat((x, x))],
    "layer_norm": [lambda m, x: m.norm(x), lambda m, x: F.layer_norm(x, (8,))],
    "linear": [lambda m, x: m.f(x), lambda m, x: F.linear(x, m.f.weight)],
    "dropout": [lambda m, x: F.dropout(x, 0.5), lambda m, x: torch.dropout(x, 0.5, True)],
    "mT": [lambda m, x: x.mT, lambda m, x: getattr(x, "mT")],  # noqa: B009
    "real": [lambda m, x: x.real, lambda m, x: torch.real(x)],
}


@pytest.mark.parametrize("name", NAMES)
def test_spellings_have_one_name(name: str) -> None:
    aliases = {"true_divide": "div"}
    found = {ops.operation(last(body)) for body in NAMES[name]}
    assert {aliases.get(spelled, spelled) for spelled in found} == {name}


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_has_the_same_names(route: str) -> None:
    def names(body: Body, *inputs: Tensor) -> list[str]:
        nodes = trace(body, *inputs, route=route).graph.nodes
        return [ops.operation(node) for node in nodes if node.op.startswith("call")]

    assert names(lambda m, x: m.norm(m.f(x) + x)) == ["linear", "add", "layer_norm"]
    assert names(lambda m, x: F.relu(m.conv(x)), images()) == ["conv2d", "relu"]


def test_nodes_that_compute_nothing_have_their_opcode() -> None:
    nodes = list(trace(lambda m, x: x * m.scale).graph.nodes)
    assert next(ops.operation(n) for n in nodes if not n.op.startswith("call")) == "placeholder"
    assert ops.operation(nodes[-1]) == "output"


MODULES = {
    "batch_norm": nn.BatchNorm2d(8),
    "instance_norm": nn.InstanceNorm2d(8),
    "group_norm": nn.GroupNorm(2, 8),
    "dropout": nn.Dropout2d(),
    "conv2d": nn.Conv2d(8, 8, 1),
    "identity": nn.Identity(),
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_have_the_name_of_what_they_compute(name: str) -> None:
    module = trace(nn.Sequential(MODULES[name]), images())
    assert ops.operation(list(module.graph.nodes)[1]) == name


ELEMENTWISE = {
    "activation": lambda m, x: torch.relu(x),
    "cast": lambda m, x: x.half(),
    "view": lambda m, x: x.view(-1),
    "transposition": lambda m, x: x.transpose(0, 1),
    "mT": lambda m, x: x.mT,
    "slice": lambda m, x: x[:, 1:],
    "dropout": lambda m, x: F.dropout(x),
    "where": lambda m, x: torch.where(x > 0, x, 0.0),
    "comparison": lambda m, x: x > 0,
    "power": lambda m, x: x**3,
    "clamp": lambda m, x: x.clamp(-1, 1),
    "in place": lambda m, x: x.mul_(2),
}
MIXING = {
    "matrix product": lambda m, x: x @ x.mT,
    "linear": lambda m, x: m.f(x),
    "norm": lambda m, x: m.norm(x),
    "softmax": lambda m, x: x.softmax(-1),
    "sum": lambda m, x: x.sum(-1),
    "scan": lambda m, x: x.cumsum(0),
    "shift": lambda m, x: torch.roll(x, 1),
    "flip": lambda m, x: x.flip(1),
    "concatenation": lambda m, x: torch.cat((x, x)),
    "gather": lambda m, x: x.gather(1, torch.zeros(2, 4, 8, dtype=torch.long)),
    "Fourier transform": lambda m, x: torch.fft.fft(x),
    "attention": lambda m, x: F.scaled_dot_product_attention(x, x, x),
    "interpolation": lambda m, x: F.interpolate(x, scale_factor=2),
}


@pytest.mark.parametrize("body", ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_elementwise_operations(body: Body) -> None:
    assert ops.is_elementwise(last(body))


@pytest.mark.parametrize("body", MIXING.values(), ids=MIXING)
def test_operations_that_mix_elements(body: Body) -> None:
    assert not ops.is_elementwise(last(body))


def test_softmax_modules_mix_and_activation_modules_do_not() -> None:
    mixing = trace(nn.Sequential(nn.Softmax(-1)), tokens())
    pointwise = trace(nn.Sequential(nn.Softplus()), tokens())
    assert not ops.is_elementwise(list(mixing.graph.nodes)[1])
    assert ops.is_elementwise(list(pointwise.graph.nodes)[1])


def test_a_cast_preserves_the_value_if_it_widens() -> None:
    def cast(before: torch.dtype, after: torch.dtype) -> bool:
        return ops.is_value_preserving(last(lambda m, x: x.to(after), tokens(dtype=before)))

    half, bf16, single, double = torch.float16, torch.bfloat16, torch.float32, torch.float64
    widening = [(half, single), (bf16, single), (single, double), (single, single), (half, double)]
    carrier = [(double, single)]  # named by models that keep their carrier in float32
    narrowing = [(single, half), (single, bf16), (half, bf16), (bf16, half), (double, half)]
    assert all(cast(*pair) for pair in widening + carrier)
    assert not any(cast(*pair) for pair in narrowing)


def test_copies_preserve_the_value() -> None:
    assert ops.is_value_preserving(last(lambda m, x: x.contiguous()))
    assert ops.is_value_preserving(last(lambda m, x: x.clone()))
    assert ops.is_value_preserving(list(trace(nn.Sequential(nn.Identity())).graph.nodes)[1])
    assert not ops.is_value_preserving(last(lambda m, x: x * 2))
    assert not ops.is_value_preserving(last(lambda m, x: x.view(-1)))
    assert not ops.is_value_preserving(last(lambda m, x: x.to("meta")))


@pytest.mark.parametrize("route", ROUTES)
def test_neutral_numbers_change_nothing(route: str) -> None:
    x = torch.ones(2, 4, 8)

    def preserves(body: Body, x: Tensor = x) -> bool:
        nodes = [n for n in trace(body, x, route=route).graph.nodes if n.op.startswith("call")]
        return all(map(ops.is_value_preserving, nodes))

    for body in (
        lambda m, x: 0 + x,
        lambda m, x: x + 0.0,
        lambda m, x: torch.add(x, 0),
        lambda m, x: x - 0,
        lambda m, x: 1.0 * x,
        lambda m, x: x / 1,
    ):
        assert preserves(body)
    for body in (
        lambda m, x: 0 - x,
        lambda m, x: 1 / x,
        lambda m, x: x + 1,
        lambda m, x: x * 0,
        lambda m, x: x + x,
        lambda m, x: torch.sub(x, m.scale),
    ):
        assert not preserves(body)
    assert not preserves(lambda m, x: x + 0.0, torch.ones(2, 4, 8, dtype=torch.int64))


def test_permutations() -> None:
    assert ops.permutation(last(lambda m, x: x.transpose(0, -1))) == (2, 1, 0)
    assert ops.permutation(last(lambda m, x: x.permute(1, 2, 0))) == (1, 2, 0)
    assert ops.permutation(last(lambda m, x: x.permute(dims=(1, 2, 0)))) == (1, 2, 0)
    assert ops.permutation(last(lambda m, x: torch.movedim(x, 0, 2))) == (1, 2, 0)
    assert ops.permutation(last(lambda m, x: x.mT)) == (0, 2, 1)
    assert ops.permutation(last(lambda m, x: x[0].t())) == (1, 0)
    assert ops.permutation(last(lambda m, x: x.reshape(4, 2, 8))) is None
    assert ops.permutation(last(lambda m, x: x + x)) is None


def test_reshapes_keep_the_order_of_elements() -> None:
    for body in (
        lambda m, x: x.view(-1, 8),
        lambda m, x: x.reshape(2, 32),
        lambda m, x: x.flatten(),
        lambda m, x: x.unflatten(2, (2, 4)),
        lambda m, x: x.unsqueeze(0),
    ):
        assert ops.is_reshape(last(body))
    for body in (lambda m, x: x.mT, lambda m, x: x[0], lambda m, x: x.expand(2, 4, 8)):
        assert not ops.is_reshape(last(body))


WRITES = {
    "method": lambda m, x: x.add_(1),
    "keyword": lambda m, x: F.relu(x, inplace=True),
    "positional": lambda m, x: F.dropout(x, 0.5, True, True),
    "out": lambda m, x: torch.add(x, 1, out=x),
    "ATen": lambda m, x: torch.ops.aten.mul_.Tensor(x, 2.0),
    "copy": lambda m, x: x.copy_(m.positions),
}
WRITES_NOTHING = {
    "method": lambda m, x: x.add(1),
    "keyword": lambda m, x: F.relu(x, inplace=False),
    "positional": lambda m, x: F.dropout(x, 0.5, True, False),
    "dunder": lambda m, x: x.__add__(1),
    "ATen": lambda m, x: torch.ops.aten.mul.Tensor(x, 2.0),
    "view": lambda m, x: x.view(-1),
}


@pytest.mark.parametrize("body", WRITES.values(), ids=WRITES)
def test_writes_in_place(body: Body) -> None:
    node = last(body)
    written = ops.writes_into(node)
    assert written is not None
    assert written.op == "placeholder"


@pytest.mark.parametrize("body", WRITES_NOTHING.values(), ids=WRITES_NOTHING)
def test_what_writes_nothing(body: Body) -> None:
    assert ops.writes_into(last(body)) is None


def test_an_inplace_module_writes() -> None:
    inplace = list(trace(nn.Sequential(nn.ReLU(inplace=True)), tokens()).graph.nodes)
    plain = list(trace(nn.Sequential(nn.ReLU()), tokens()).graph.nodes)
    assert ops.writes_into(inplace[1]) is inplace[0]
    assert ops.writes_into(plain[1]) is None


@pytest.mark.parametrize("route", ["dynamo", "export"])
def test_an_assignment_to_a_slice_writes(route: str) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.f(x)
        y[:, 0] = 0.0
        return m.g(y)

    nodes = trace(body, route=route).graph.nodes
    assert sum(ops.writes_into(node) is not None for node in nodes) == 1


@pytest.mark.parametrize("route", ["dynamo", "export"])
def test_an_augmented_assignment_writes(route: str) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.f(x)
        y += 1
        y -= x
        y *= 2
        y /= 3
        return y + 1

    nodes = trace(body, route=route).graph.nodes
    written = [ops.operation(node) for node in nodes if ops.writes_into(node) is not None]
    assert written == ["add", "sub", "mul", "div"]


def test_aliases() -> None:
    assert ops.aliases_argument(last(lambda m, x: x.view(-1)))
    assert ops.aliases_argument(last(lambda m, x: x.mT))
    assert ops.aliases_argument(last(lambda m, x: x[0]))
    assert ops.aliases_argument(last(lambda m, x: x.to(torch.float32)))
    assert not ops.aliases_argument(last(lambda m, x: x + 1))
    assert not ops.aliases_argument(last(lambda m, x: x.clone()))
    assert not ops.aliases_argument(last(lambda m, x: x.double()))


def test_values_shapes_and_operands() -> None:
    def arguments(body: Body) -> list[str]:
        return [node.op for node in ops.value_arguments(last(body))]

    assert arguments(lambda m, x: torch.zeros_like(x)) == []
    assert arguments(lambda m, x: x.expand_as(m.f(x))) == ["placeholder"]
    assert arguments(lambda m, x: x.view(x.size(0), -1)) == ["placeholder"]
    assert arguments(lambda m, x: x * m.scale) == ["placeholder", "get_attr"]
    doubled = last(lambda m, x: x + x)
    assert len(ops.operands(doubled)) == 2
    assert len(ops.tensor_arguments(doubled)) == 1
    keywords = last(lambda m, x: torch.add(input=x, other=m.scale))
    assert [node.op for node in ops.operands(keywords)] == ["placeholder", "get_attr"]


def test_arguments_by_position_or_name() -> None:
    assert ops.argument(last(lambda m, x: torch.add(x, x, alpha=2)), 2, "alpha", 1) == 2
    assert ops.argument(last(lambda m, x: torch.sum(x, -1)), 1, "dim") == -1
    assert ops.argument(last(lambda m, x: torch.add(x, x)), 2, "alpha", 1) == 1


def test_additions_are_of_tensors() -> None:
    assert ops.is_addition(last(lambda m, x: x + x))
    assert not ops.is_addition(last(lambda m, x: x * x))
    sizes = trace(lambda m, x: x.view(x.size(0) + 0, -1)).graph.nodes
    assert not any(ops.is_addition(node) for node in sizes)
