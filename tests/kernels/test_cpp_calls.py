"""The operators that a compiled graph calls for the C++ phases: by whom, and their shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

import attnres_compile  # noqa: F401  (registers the operators)
from attnres_compile.functional import attnres
from attnres_compile.kernels import cpp_calls

FAST = {f"attnres.cpp_{name}.default" for name in cpp_calls.NAMES}
SLOW = {f"attnres.{name}.default" for name in cpp_calls.NAMES}


def called(kernels: str, dtype: torch.dtype = torch.float32) -> tuple[set[str], Tensor]:
    """The operators in the graphs that Inductor compiles for a network of two blocks."""
    found: set[str] = set()

    def watch(graph: fx.Graph) -> None:
        found.update(str(node.target) for node in graph.nodes)

    weight, queries = torch.randn(8, 8, dtype=dtype), torch.randn(5, 8, requires_grad=True)

    def model(x: Tensor) -> Tensor:
        blocks, partial = [x, torch.sin(x), torch.cos(x)], x * 0
        for query in queries.unbind():
            partial = partial + torch.tanh(attnres([*blocks, partial], query) @ weight)
        return partial

    options: dict[str, Any] = {"kernels": kernels, "post_grad_custom_post_pass": watch}
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(model, backend="attnres", fullgraph=True, options=options)
        x = torch.randn(3, 8, dtype=dtype)
        result: Tensor = compiled(x)
        result.sum().backward()
    torch.testing.assert_close(result, model(x), rtol=1e-5, atol=1e-5)
    return found, result


def test_a_compiled_graph_calls_the_fast_operators() -> None:
    found, _ = called("auto")
    assert found >= FAST
    assert not found & SLOW


def test_other_implementations_do_not() -> None:
    found, _ = called("reference")
    assert not found & (FAST | SLOW)
    assert "attnres.mix.default" in found


@pytest.mark.parametrize("norm_dtype", [None, torch.float32])
def test_shapes_are_those_of_the_results(norm_dtype: torch.dtype | None) -> None:
    cpp_calls.decompositions()
    operators = torch.ops.attnres
    source, query = torch.randn(3, 5, 16, dtype=torch.bfloat16), torch.randn(16)

    def run(source: Tensor, query: Tensor) -> list[Tensor]:
        found = operators.cpp_complete.default(
            [source, source], torch.stack([query, query]), 1e-6, -1
        )
        mixes, statistics, carriers = operators.cpp_phase1.default(
            [source, found[0]], [source, source], [found[1], found[1]], -1
        )
        last = operators.cpp_phase2.default(
            *(mixes[0], statistics[0], [], [source, source], query, 1e-6, 3.0),
            *("layer", query, None, 1e-5, norm_dtype, True, -1),
        )
        return [*found, *mixes, statistics, *carriers, *last]

    real = run(source, query)
    with FakeTensorMode() as mode:
        fake = run(mode.from_tensor(source), mode.from_tensor(query))
    assert [(f.shape, f.dtype, f.stride()) for f in fake] == [
        (r.shape, r.dtype, r.stride()) for r in real
    ]
