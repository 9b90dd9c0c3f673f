"""Sums over tokens that C++ forms, and what Inductor must be left to sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from attnres_compile.functional import attnres
from attnres_compile.kernels import cpp_library
from attnres_compile.passes.inline_cpp_phases import InlineCppPhases
from attnres_compile.passes.sum_tokens import sum_tokens
from tolerances import relative_error

Body = Callable[[Tensor, Tensor], Any]
ROWS, OTHER = (7, 5), (5, 3)


def linear_backward(grad: Tensor, weight: Tensor) -> Any:
    return grad @ weight, grad.sum([0])


def summed(body: Body, dtype: torch.dtype = torch.float64, like: Any = None) -> list[str]:
    """The operators of a graph after the pass, whose results must be the same."""
    rows = torch.randn(ROWS, dtype=dtype) if like is None else like
    given = (rows, torch.randn(OTHER, dtype=dtype))
    cpp_library.prepare(torch.float64)
    traced = make_fx(body)(*given)
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            node.meta.setdefault("val", given[0])
    sum_tokens(traced.graph, {torch.float64})
    traced.graph.lint()
    traced.recompile()
    for actual, expected in zip(traced(*given), body(*given), strict=True):
        assert relative_error(actual, expected) < 1e-13 or dtype != torch.float64
        assert actual.shape == expected.shape
    return [str(node.target) for node in traced.graph.nodes]


@pytest.mark.parametrize(
    "body",
    [
        linear_backward,
        lambda grad, weight: (grad @ weight, grad.sum([0], True)),
        lambda grad, weight: (grad.T @ grad, grad.sum([0])),  # an input without a gradient
        lambda grad, weight: (grad @ weight, grad.sum([0]), grad.sum([0], True)),
    ],
)
def test_a_bias_gradient_is_summed_by_the_library(body: Body) -> None:
    found = summed(body)
    assert "aten.sum.dim_IntList" not in found
    assert "attnres.cpp_sum_tokens.float64" in found


@pytest.mark.parametrize(
    "body",
    [
        lambda grad, weight: (grad @ weight, (grad * 2).sum([0])),  # rows that nothing else reads
        lambda grad, weight: (grad @ weight, grad.sum([1])),
        lambda grad, weight: (grad @ weight, grad.sum([0, 1])),
        lambda grad, weight: (grad @ weight, grad.sum(None, True)),
        lambda grad, weight: (grad @ weight, grad.sum([0], dtype=torch.float32)),
        lambda grad, weight: (grad @ weight, grad.T.sum([0])),
        lambda grad, weight: (grad @ weight, grad[None].sum([0])),
    ],
)
def test_another_sum_is_left_alone(body: Body) -> None:
    found = summed(body)
    assert "aten.sum.dim_IntList" in found
    assert "attnres.cpp_sum_tokens.float64" not in found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_so_is_one_of_a_dtype_that_no_stream_has(dtype: torch.dtype) -> None:
    assert "aten.sum.dim_IntList" in summed(linear_backward, dtype)


def test_so_is_one_of_columns_in_memory() -> None:
    turned = torch.randn(ROWS[::-1], dtype=torch.float64).T
    assert "aten.sum.dim_IntList" in summed(linear_backward, like=turned)


@pytest.mark.parametrize(("device", "tracing_mode"), [("meta", "fake"), ("cpu", "symbolic")])
def test_so_is_one_on_another_device_or_of_an_unknown_width(device: str, tracing_mode: Any) -> None:
    given = (torch.randn(ROWS, device=device), torch.randn(OTHER, device=device))
    graph = make_fx(linear_backward, tracing_mode=tracing_mode)(*given).graph
    sum_tokens(graph, {torch.float32})
    targets = [node.target for node in graph.nodes]
    assert targets.count(torch.ops.aten.sum.dim_IntList) == 1


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("tokens", [0, 1, 2, 4, 7, 257])
@pytest.mark.parametrize("width", [1, 3, 8, 63, 64, 65, 1000])
def test_every_row_is_summed_once(threads: int, tokens: int, width: int) -> None:
    rows = torch.randn(tokens, width)
    room = torch.full((3, width), torch.nan)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        cpp_library.operator("sum_tokens", torch.float32)([rows], room[1])
    finally:
        torch.set_num_threads(before)
    most = 1e-6 * rows.abs().sum(0).max()
    assert (room[1] - rows.double().sum(0)).abs().max() <= most
    assert room[[0, 2]].isnan().all()


def test_many_tokens_are_summed_in_parts() -> None:
    rows, total = torch.rand(200_001, 5), torch.empty(5)
    cpp_library.operator("sum_tokens", torch.float32)([rows], total)
    assert relative_error(total, rows.double().sum(0)) < 1e-6


class Network(nn.Module):
    """A site before a linear layer, whose bias's gradient no site can sum."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 24, dtype=dtype)
        self.query = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        mixed = attnres([x, x.tanh()], self.query.to(x.dtype))
        wide: Tensor = self.layer(mixed)
        return wide.sin()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("dtype", "limit", "calls"),
    [(torch.float32, 1e-5, 1), (torch.float64, 1e-12, 1), (torch.bfloat16, 3e-2, 0)],
)
def test_in_a_compiled_model(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, limit: float, calls: int, dynamic: bool
) -> None:
    found: list[str] = []
    inline = InlineCppPhases.__call__

    def watched(self: InlineCppPhases, graph: fx.Graph) -> None:
        inline(self, graph)
        found.extend(str(node.target) for node in graph.nodes)

    monkeypatch.setattr(InlineCppPhases, "__call__", watched)
    torch._dynamo.reset()
    network = Network(dtype)
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(network, backend="attnres", fullgraph=True, dynamic=dynamic)
        for tokens in (6, 9):
            x = torch.randn(3, tokens, 8, dtype=dtype)
            expected = torch.autograd.grad(network(x).square().sum(), network.layer.bias)[0]
            actual = torch.autograd.grad(compiled(x).square().sum(), network.layer.bias)[0]
            assert relative_error(actual, expected) < limit
    graphs = 1 if dynamic else 2  # the second length makes sizes dynamic
    assert sum(each.startswith("attnres.cpp_sum_tokens") for each in found) == calls * graphs


def test_the_dtype_is_that_of_the_library_and_not_of_a_wide_norm() -> None:
    """A stream of bfloat16, whose norm and head are of float32."""
    head, norm = nn.Linear(8, 24), nn.Parameter(torch.ones(8))
    query = torch.randn(8, dtype=torch.bfloat16)

    def model(x: Tensor) -> Tensor:
        mixed = attnres([x, x.tanh()], query).float()
        wide: Tensor = head(
            mixed * torch.rsqrt(mixed.square().mean(-1, keepdim=True) + 1e-6) * norm
        )
        return wide.sin()

    x = torch.randn(6, 8, dtype=torch.bfloat16, requires_grad=True)
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.enable_kernel_profile": True}):
        cpp_library._library.cache_clear()
        compiled = torch.compile(model, backend="attnres", fullgraph=True)
        actual = torch.autograd.grad(compiled(x).square().sum(), head.bias)[0]
    assert cpp_library._library.cache_info().currsize == 1
    expected = torch.autograd.grad(model(x).square().sum(), head.bias)[0]
    assert relative_error(actual, expected) < 3e-2
