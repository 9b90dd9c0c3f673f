"""Biases of linear layers that C++ adds, and what must be left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from attnres_compile.functional import attnres
from attnres_compile.passes.inline_cpp_phases import InlineCppPhases
from tolerances import relative_error

WIDTH = 8
Counts = dict[str, int]


class Network(nn.Module):
    """Blocks of two linear layers each; `read` sees what a layer returns."""

    def __init__(self, read: Callable[[Tensor], Tensor] | None = None, blocks: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2 * blocks))
        self.queries = nn.Parameter(torch.randn(2 * blocks, WIDTH) / 3)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        blocks, extra = [x], x.new_zeros(())
        partial: Tensor | None = None
        for number, layer in enumerate(self.layers):
            sources = blocks if partial is None else [*blocks, partial]
            branch = layer(torch.tanh(attnres(sources, self.queries[number].to(x.dtype))))
            if self.read is not None:
                extra = extra + self.read(branch).sum()
            partial = branch if partial is None else partial + branch
            if number % 2:
                blocks, partial = [*blocks, partial], None
        return attnres(blocks, self.queries[0].to(x.dtype)) + extra


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """How often an operator stands in the graphs after the pass."""
    found: Counts = {}
    inline = InlineCppPhases.__call__

    def watched(self: InlineCppPhases, graph: fx.Graph) -> None:
        inline(self, graph)
        for node in graph.nodes:
            found[str(node.target)] = found.get(str(node.target), 0) + 1

    monkeypatch.setattr(InlineCppPhases, "__call__", watched)
    return found


def errors(network: Network, dtype: torch.dtype = torch.float64) -> dict[str, float]:
    """Of the output and of every gradient, compiled against eager."""
    network = network.to(dtype)
    x = torch.randn(3, 5, WIDTH, dtype=dtype, requires_grad=True)

    def run(function: Any) -> dict[str, Tensor]:
        y = function(x)
        inputs = {"x": x, **dict(network.named_parameters())}
        grads = torch.autograd.grad(y.square().sum(), list(inputs.values()))
        return {"y": y, **dict(zip(inputs, grads, strict=True))}

    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        actual = run(torch.compile(network, backend="attnres", fullgraph=True))
    expected = run(network)
    return {name: relative_error(actual[name], expected[name]) for name in expected}


def test_sites_add_the_biases_that_they_can(counts: Counts) -> None:
    found = errors(Network())
    assert max(found.values()) < 1e-10, found
    # The second layer of a block is added to the first's result, by the site that opens the next
    # block; the first stands alone.
    assert counts["aten.addmm.default"] == 3
    # Twelve gradients of weights and inputs, and three products without their bias.
    assert counts["aten.mm.default"] == 12 + 3
    # Six gradients of biases, all of layers whose results a site reads.
    assert "aten.sum.dim_IntList" not in counts
    assert "attnres.cpp_sum_tokens.float64" not in counts


def test_what_completes_a_source_adds_the_bias_too(counts: Counts) -> None:
    found = errors(Network(blocks=5))
    assert max(found.values()) < 1e-10, found
    assert counts["attnres.cpp_complete.float64"] == 5
    # The first layers of blocks stand alone.
    assert counts["aten.addmm.default"] == 5
    assert "aten.sum.dim_IntList" not in counts
    assert "attnres.cpp_sum_tokens.float64" not in counts


def test_a_branch_that_is_read_twice_keeps_its_bias(counts: Counts) -> None:
    layer, query = nn.Linear(WIDTH, WIDTH), torch.randn(WIDTH)

    def model(x: Tensor) -> Tensor:
        y = layer(x)
        return attnres([x, y, x + y], query)

    assert inference_error(model) < 1e-6
    assert counts["aten.addmm.default"] == 1


@pytest.mark.parametrize("features", [WIDTH // 2, 2 * WIDTH])
def test_a_result_that_is_seen_at_another_width_keeps_its_bias(
    counts: Counts, features: int
) -> None:
    layer, query = nn.Linear(WIDTH, features), torch.randn(WIDTH)

    def model(x: Tensor) -> Tensor:
        y = layer(x).view(-1, WIDTH)  # which only the addition reads
        root = torch.cat([x, -x])[: len(y)]
        return attnres([root, root + y], query)

    assert inference_error(model) < 1e-6
    assert counts["aten.addmm.default"] == 1


def test_either_operand_of_the_addition_may_have_it(counts: Counts) -> None:
    layer, query = nn.Linear(WIDTH, WIDTH), torch.randn(WIDTH)
    assert inference_error(lambda x: attnres([x, layer(x) + x], query)) < 1e-6
    assert counts.get("aten.addmm.default", 0) == 0


def test_what_is_summed_over_a_batch_alone_is_no_bias() -> None:
    position, query = nn.Parameter(torch.randn(5, WIDTH)), torch.randn(WIDTH)

    def model(x: Tensor) -> Tensor:
        return attnres([x, x + position], query)

    x = torch.randn(3, 5, WIDTH, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="attnres", fullgraph=True)
    actual, expected = (
        torch.autograd.grad(run(x).square().sum(), position)[0] for run in (compiled, model)
    )
    assert relative_error(actual, expected) < 1e-5


def inference_error(model: Callable[[Tensor], Tensor]) -> float:
    torch._dynamo.reset()
    x = torch.randn(6, WIDTH)
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(model, backend="attnres", fullgraph=True)
        return relative_error(compiled(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("read", [torch.sin, torch.abs])
def test_a_layer_that_others_read_keeps_its_bias(
    counts: Counts, read: Callable[[Tensor], Tensor]
) -> None:
    found = errors(Network(read))
    assert max(found.values()) < 1e-10, found
    assert counts["aten.addmm.default"] == 6


@pytest.mark.slow
def test_a_stream_that_is_rounded_keeps_its_biases(counts: Counts) -> None:
    found = errors(Network(), torch.bfloat16)
    assert found["y"] < 3e-2, found
    assert counts["aten.addmm.default"] == 6
