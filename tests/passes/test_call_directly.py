"""Compiled code calls the functions of the C++ library themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from attnres_compile.functional import attnres
from tolerances import relative_error

WEIGHT = torch.linspace(-1, 1, 64, dtype=torch.float64).view(8, 8)
QUERIES = torch.linspace(1, 2, 16, dtype=torch.float64).view(2, 8)


def model(x: Tensor, query: Tensor) -> Tensor:
    """Of its sources one is memory from outside, one begins in the middle of another's memory."""
    rows = len(x) // 2
    both = torch.tanh(x @ WEIGHT)
    return attnres([x[rows:], both[:rows], both[rows:]], query).square()


def results(run: Any, x: Tensor, query: Tensor = QUERIES[1]) -> list[Tensor]:
    inputs = [x.clone().requires_grad_(), query.clone().requires_grad_()]
    result = run(*inputs)
    return [result, *torch.autograd.grad(result.sum(), inputs)]


def compiled_results(x: Tensor, **options: Any) -> tuple[list[Tensor], str]:
    """Output and gradients, and the code that Inductor wrote for both directions."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="attnres", fullgraph=True, options=options)
    with torch._inductor.config.patch(force_disable_caches=True):
        found, codes = run_and_get_code(lambda: results(compiled, x))
    return found, "\n".join(codes)


def check(found: list[Tensor], x: Tensor) -> None:
    expected = results(model, x)
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(found, expected, strict=True))


X = torch.linspace(-2, 3, 6 * 8, dtype=torch.float64).view(6, 8).cos()


def test_functions_are_called_past_the_dispatcher() -> None:
    found, code = compiled_results(X)
    check(found, X)
    assert "attnres_float64.phase2(" in code
    assert "attnres_float64.phase2_backward(" in code
    assert "ops.attnres" not in code


def test_with_kernels_in_the_profile_they_stay_operators() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        found, code = compiled_results(X, **{"cpp.enable_kernel_profile": True})
    check(found, X)
    assert "attnres_float64" not in code
    ran = {event.key for event in profile.key_averages()}
    assert {"attnres::cpp_phase2", "attnres::cpp_phase2_backward"} <= ran


@pytest.mark.slow
def test_from_cpp_they_stay_operators() -> None:
    found, code = compiled_results(X, cpp_wrapper=True)
    check(found, X)
    assert "attnres_float64" not in code
    assert "cpp_phase2_backward" in code


def test_sizes_that_vary_are_handed_on() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="attnres", fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for rows in (6, 14, 10):
        x = torch.linspace(-2, 3, rows * 8, dtype=torch.float64).view(rows, 8).cos()
        check(results(compiled, x), x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_queries_from_the_middle_of_a_tensor() -> None:
    def of_rows(x: Tensor, queries: Tensor) -> Tensor:
        return attnres([x, x.sin()], queries[1])

    torch._dynamo.reset()
    compiled = torch.compile(of_rows, backend="attnres", fullgraph=True)
    for a, b in zip(results(compiled, X, QUERIES), results(of_rows, X, QUERIES), strict=True):
        assert relative_error(a, b) < 1e-12
