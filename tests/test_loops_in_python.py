"""Loops in `scan` and `while_loop` are converted like their twins that loop in Python."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops import while_loop
from torch._higher_order_ops.scan import scan
from torch.utils.checkpoint import checkpoint

import attnres_compile
from attnres_compile.errors import MismatchError
from conversions import randomize
from looping_models import LAYERS, TOLERANCE, WIDTH, Layers, attention, build, feed_forward, norm
from tolerances import relative_error


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


class Looping(Layers):
    """Runs the loop that it is given, with PyTorch's operators or their twins in Python."""

    def __init__(self, loop: Callable[..., Tensor], scan: Any, while_loop: Any) -> None:
        super().__init__()
        self.loop, self.scan, self.while_loop = loop, scan, while_loop
        self.layer, self.other = Layer(), Layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(norm(self.loop(self, self.embed(x))))


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def python_scan(body: Any, state: Any, slices: Any) -> tuple[Any, Any]:
    outputs = []
    for each in slices:
        state, output = body(state, each)
        outputs.append(output)
    return state, torch.stack(outputs)


def python_while_loop(_condition: Any, body: Any, state: Any) -> Any:
    for _ in range(LAYERS):
        state = body(*state)
    return state


def module_in_while_loop(m: Any, x: Tensor) -> Tensor:
    def body(i: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return i + 1, m.layer(x)

    result: Tensor = m.while_loop(lambda i, x: i < LAYERS, body, (torch.tensor(0), x))[1]
    return result


def module_in_scan(m: Any, x: Tensor) -> Tensor:
    state: Tensor = m.scan(lambda x, i: (m.layer(x), x.sum()), x, torch.arange(LAYERS))[0]
    return state


def two_modules(m: Any, x: Tensor) -> Tensor:
    state: Tensor = m.scan(lambda x, i: (m.other(m.layer(x)), x.sum()), x, torch.arange(2))[0]
    return state


def sum_and_branch(m: Any, x: Tensor) -> Tensor:
    """The addition of an iteration is that of the branch before: its body alone shows none."""

    def body(state: Any, weight: Tensor) -> Any:
        branch, total = state
        total = branch + total
        return (feed_forward(total, weight), total), total.sum()

    branch, total = m.scan(body, (x, torch.zeros_like(x)), m.first)[0]
    return branch + total


def state_and_its_norm(m: Any, x: Tensor) -> Tensor:
    def body(state: Any, weight: Tensor) -> Any:
        x = state[0] + torch.tanh(state[1] @ weight)
        return (x, norm(x)), x.sum()

    result: Tensor = m.scan(body, (x, norm(x)), m.first)[0][1]
    return result


def two_that_swap(m: Any, x: Tensor) -> Tensor:
    def body(state: Any, weight: Tensor) -> Any:
        a, b = state
        return (b.clone(), a + feed_forward(b, weight)), x.sum()

    a, b = m.scan(body, (x, 2 * x), torch.cat([m.first, m.second]))[0]
    return torch.sin(a) + b


def checkpointed(m: Any, x: Tensor) -> Tensor:
    def layer(x: Tensor, weight: Tensor) -> Tensor:
        return x + feed_forward(x, weight)

    def body(x: Tensor, weight: Tensor) -> Any:
        return checkpoint(layer, x, weight, use_reentrant=False), x.sum()

    state: Tensor = m.scan(body, x, m.first)[0]
    return state


def both_kinds(loop: Any, wrap: Any = lambda model: model) -> tuple[nn.Module, nn.Module, Tensor]:
    """A model with a loop and its twin in Python, of the same weights."""
    model, x = build(lambda: wrap(Looping(loop, scan, while_loop)))
    twin, _ = build(lambda: wrap(Looping(loop, python_scan, python_while_loop)))
    return model, twin, x


def outcome(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and all gradients of a converted model, by the order of its sites."""
    converted: Any = attnres_compile.convert(copy.deepcopy(model), (x,))
    randomize(converted)
    weights = torch.randn((2, 4, 3), generator=torch.Generator().manual_seed(1)).double()
    output = converted(x)
    (output * weights).sum().backward()
    assert converted.plan.num_residual_additions >= LAYERS
    return [output, *[p.grad for p in converted.parameters() if p.grad is not None]]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max().item() <= TOLERANCE * max(b.abs().max().item(), 1e-3)


@pytest.mark.parametrize(
    "loop",
    [
        module_in_while_loop,
        module_in_scan,
        two_modules,
        sum_and_branch,
        state_and_its_norm,
        two_that_swap,
        checkpointed,
    ],
)
def test_loops_run_as_in_python(loop: Any) -> None:
    model, twin, x = both_kinds(loop)
    assert_same(outcome(model, x), outcome(twin, x))


def test_a_looping_module_in_another_runs_as_in_python() -> None:
    model, twin, x = both_kinds(module_in_while_loop, Around)
    expected = outcome(twin, x)
    assert_same(outcome(model, x), expected)
    converted: Any = attnres_compile.convert(model, (x,))
    randomize(converted)
    with torch.no_grad():
        compiled = torch.compile(converted, backend="attnres", fullgraph=True)
        assert relative_error(compiled(x), expected[0]) <= TOLERANCE


def one_turn_a_token(m: Any, x: Tensor) -> Tensor:
    state: Tensor = m.scan(
        lambda x, i: (x + attention(x, m.first[0]), x.sum()), x, torch.arange(x.shape[1])
    )[0]
    return state


@pytest.mark.parametrize("first", [4, 5])
def test_as_many_iterations_as_tokens_are_refused_at_another_length(first: int) -> None:
    """Sizes are constants of a capture: it cannot be told from a number of layers."""
    model, _, x = both_kinds(one_turn_a_token)
    converted: Any = attnres_compile.convert(model, (x,))
    longer = torch.cat([x, x[:, :1]], 1)
    if first == 4:  # then the size is symbolic in the second call
        assert relative_error(converted(x), model(x)) <= TOLERANCE
    with pytest.raises(
        MismatchError, match=r"scan at test_loops_in_python.py:\d+ runs as often as an inp"
    ):
        converted(longer)
