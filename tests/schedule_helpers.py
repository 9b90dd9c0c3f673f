"""Graphs with mixes for the passes that schedule, fuse and lower them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._dynamo.backends.debugging import aot_eager

from attnres_compile.functional import attnres
from tolerances import relative_error

WIDTH = 16
Tensors = dict[str, Tensor]
Body = Callable[[Tensors], Tensor]
Change = Callable[[fx.Graph], None]


def tensors(branches: int, dtype: torch.dtype = torch.float64) -> Tensors:
    """A root, branches, and queries, gains, weights and biases by number; all want gradients."""
    torch.manual_seed(0)
    made = {f"branch{i}": torch.randn(2, 3, WIDTH) for i in range(branches)}
    for name in ("query", "gain", "weight", "bias"):
        made |= {f"{name}{i}": torch.randn(WIDTH) for i in range(branches + 1)}
    made["root"] = torch.randn(2, 3, WIDTH)
    return {name: value.to(dtype).requires_grad_() for name, value in made.items()}


def network(
    given: Tensors,
    blocks: tuple[int, ...],
    reader: Callable[[Tensor, Tensors, int], Tensor] = lambda mixed, given, i: mixed,
) -> Tensor:
    """Block AttnRes over branches ``tanh(branch + what is read)``; `blocks` in sublayers each."""
    completed, partial, sites = [given["root"]], None, 0
    read = given["root"]
    for size in blocks:
        for _ in range(size):
            out = torch.tanh(given[f"branch{sites}"] + read)
            partial = out if partial is None else partial + out
            sites += 1
            if sites == sum(blocks[: len(completed)]):
                completed, partial = [*completed, partial], None
            sources = completed if partial is None else [*completed, partial]
            query, gain = given[f"query{sites}"], given[f"gain{sites}"]
            read = reader(attnres(sources, query, gain, aggregate="sum"), given, sites)
    return read


def network_of_deltas(given: Tensors, blocks: tuple[int, ...]) -> Tensor:
    """A post-norm chain with differences of its states as sources; `blocks` in sublayers each."""
    state = start = read = given["root"]
    completed, sites = [state], 0
    for size in blocks:
        for step in range(size):
            state = F.layer_norm(state + torch.tanh(given[f"branch{sites}"] + read), (WIDTH,))
            sites += 1
            sources = [*completed, state - start]
            if step + 1 == size:
                completed, start = sources, state
            read = attnres(sources, given[f"query{sites}"], given[f"gain{sites}"], aggregate="sum")
    return read


def captured(body: Body, given: Tensors, change: Change) -> tuple[fx.Graph, Tensors]:
    """The graph of a function after a change, and its result with all gradients."""
    graphs: list[fx.Graph] = []

    def backend(module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        change(module.graph)
        module.graph.lint()
        module.recompile()
        graphs.append(module.graph)
        return aot_eager(module, inputs)  # type: ignore[no-any-return]

    torch._dynamo.reset()
    leaves = {name: value.detach().clone().requires_grad_() for name, value in given.items()}
    result = torch.compile(body, backend=backend, fullgraph=True)(leaves)
    # Not a sum of squares: a norm would leave nothing of its gradient.
    torch.sin(3 * result).sum().backward()
    grads = {f"d{n}": leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}
    return graphs[0], {"result": result.detach(), **grads}


def assert_unchanged_values(body: Body, given: Tensors, change: Change) -> fx.Graph:
    """Asserts that a change of the graph changes neither result nor gradients."""
    _, expected = captured(body, given, lambda graph: None)
    graph, found = captured(body, given, change)
    assert found.keys() == expected.keys()
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) < 1e-10, errors
    return graph


def count(graph: fx.Graph, operator: str) -> int:
    packet = getattr(torch.ops.attnres, operator)
    return sum(node.target in (packet, packet.default) for node in graph.nodes)


def sites(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target is torch.ops.attnres.phase2.default]
