"""Tiny graphs for the tests of the passes: trace a function or a module, and say what was found."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from attnres_compile.capture import annotate_symbolic, capture
from attnres_compile.passes.find_streams import find_streams
from attnres_compile.passes.streams import Refusal, StreamAnalysis

WIDTH = 8
ROUTES = ("symbolic", "dynamo", "export")
Body = Callable[..., Any]


class Branches(nn.Module):
    """A model around one function `body(layers, x)` or `body(layers, x, y)`, with some layers."""

    def __init__(self, body: Body, width: int = WIDTH) -> None:
        super().__init__()
        self.body = body
        self.takes_two = len(inspect.signature(body).parameters) == 3
        self.f = nn.Linear(width, width)
        self.g = nn.Linear(width, width)
        self.h = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.scale = nn.Parameter(torch.rand(width))
        self.positions = nn.Parameter(torch.randn(4, width))
        self.memory: Tensor
        self.register_buffer("memory", torch.zeros(4, width))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return self.body(self, x, y) if self.takes_two else self.body(self, x)


def tokens(*, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 4, WIDTH, dtype=dtype)


def images() -> Tensor:
    return torch.randn(2, WIDTH, 6, 6)


def trace(model: nn.Module | Body, *inputs: Any, route: str = "symbolic") -> fx.GraphModule:
    """The graph of a model or function, with example values and module calls."""
    inputs = inputs or (tokens(),)
    if not isinstance(model, nn.Module):
        model = Branches(model)
    if route == "dynamo":
        return capture(model, inputs).module
    if route == "export":
        return capture(model, inputs, route="export").module
    module = fx.symbolic_trace(model)
    missing = sum(node.op == "placeholder" for node in module.graph.nodes) - len(inputs)
    with torch.no_grad():
        _Values(module).run(*inputs, *[None] * missing)
    annotate_symbolic(module)
    return module


class _Values(fx.Interpreter):
    """Runs a graph and leaves at every node the value that it had."""

    def run_node(self, node: fx.Node) -> Any:
        node.meta["val"] = super().run_node(node)
        return node.meta["val"]


def analyse(body: Body, *inputs: Any, route: str = "symbolic") -> StreamAnalysis:
    """What `find_streams` finds in a function of (layers, *inputs)."""
    return find_streams(trace(body, *inputs, route=route).graph)


def depths(analysis: StreamAnalysis) -> list[int]:
    """Residual additions per stream."""
    return [len(stream.additions) for stream in analysis.streams]


def sublayers(analysis: StreamAnalysis) -> list[tuple[int, ...]]:
    """Residual additions per sublayer, per stream."""
    return [tuple(map(len, stream.sublayers)) for stream in analysis.streams]


def site_depths(analysis: StreamAnalysis) -> list[tuple[int, ...]]:
    """Depths at which each stream is read."""
    return [tuple(site.depth for site in stream.sites) for stream in analysis.streams]


def refused(analysis: StreamAnalysis) -> list[str]:
    """The kinds of the refusals."""
    return refused_kinds(analysis.refusals)


def refused_kinds(refusals: Iterable[Refusal]) -> list[str]:
    return [refusal.kind for refusal in refusals]


def twice(step: Body) -> Body:
    """The same step two times: two sublayers, where one would be too few."""

    def body(m: Any, x: Tensor) -> Tensor:
        return step(m, step(m, x))

    return body


def pre_norm(m: Any, x: Tensor) -> Tensor:
    x = x + m.f(m.norm(x))
    return x + m.g(m.norm(x))


# Steps of a chain whose carrier is altered after each addition, by the kind of the refusal; and the
# same operations on the branch, where they are harmless.
BREAKS: dict[str, Body] = {
    "post-norm": lambda m, x: m.norm(x + m.f(x)),
    "post-activation": lambda m, x: F.relu(x + m.f(x)),
    "dropout": lambda m, x: F.dropout(x + m.f(x), 0.1, training=False),
    "narrowing-cast": lambda m, x: (x + m.f(x)).to(torch.bfloat16).float(),
    "scaled-carrier": lambda m, x: (x + m.f(x)) * 0.9,
    "changed-carrier": lambda m, x: (x + m.f(x)).masked_fill(m.positions > 1, 0.0),
}
UNBROKEN: dict[str, Body] = {
    "norm on the branch": lambda m, x: x + m.norm(m.f(x)),
    "activation on the branch": lambda m, x: x + F.relu(m.f(x)),
    "dropout on the branch": lambda m, x: x + F.dropout(m.f(x), 0.1),
    "narrowing cast on the branch": lambda m, x: x + m.f(x).to(torch.bfloat16).float(),
    "scaled branch": lambda m, x: x + m.f(x) * 0.9,
    "masked branch": lambda m, x: x + m.f(x).masked_fill(m.positions > 1, 0.0),
}
