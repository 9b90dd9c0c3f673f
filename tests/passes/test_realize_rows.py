"""What many sites read, Inductor writes down once."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch._functorch.config
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from attnres_compile.functional import attnres
from tolerances import relative_error


def buffers_of_the_root(make_root: str, transposed: bool = False) -> tuple[int, int]:
    """How many buffers four sites read a root from, and how many sites there are in the code."""
    weight, queries = torch.randn(8, 8).double(), torch.randn(4, 8).double()

    def model(x: Tensor) -> Tensor:
        root = {"scaled": x * 2, "sum of two": x.sin() + 2 * x.t(), "given": x}[make_root]
        blocks = [root.t().contiguous().t() if transposed else root]
        for query in queries.unbind():
            blocks.append(torch.tanh(attnres(blocks, query) @ weight))
        return blocks[-1]

    x = torch.randn(8, 8).double()
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
        compiled = torch.compile(model, backend="attnres", fullgraph=True)
        actual, (code,) = run_and_get_code(compiled, x)
        assert relative_error(actual, model(x)) < 1e-12
    first_sources = re.findall(r"attnres_float64\.phase2\(\[([\w(]+)", code)
    return len(set(first_sources)), len(first_sources)


def test_a_root_that_loops_make_is_made_once() -> None:
    assert buffers_of_the_root("sum of two") == (1, 4)
    assert buffers_of_the_root("scaled") == (1, 4)


def test_a_root_that_is_given_is_read_where_it_is() -> None:
    assert buffers_of_the_root("given") == (1, 4)


def test_a_root_in_another_layout_is_mixed_as_well() -> None:
    _, sites = buffers_of_the_root("given", transposed=True)
    assert sites == 4


@pytest.mark.parametrize("default", ["needs_fixed_stride_order", "flexible_layout"])
def test_other_defaults_for_layouts_change_nothing(default: str) -> None:
    with torch._functorch.config.patch(custom_op_default_layout_constraint=default):
        assert buffers_of_the_root("sum of two") == (1, 4)


WEIGHT = torch.linspace(-1, 1, 64, dtype=torch.float64).view(8, 8)
QUERY = torch.linspace(1, 2, 8, dtype=torch.float64)
Results = tuple[Tensor, ...]


def branch_of_a_site(x: Tensor) -> Results:
    branch = torch.sin(x @ WEIGHT)
    read = torch.cos(branch)
    return attnres([x, torch.tanh(x) + branch], QUERY), read.square()


def branch_of_a_source(x: Tensor) -> Results:
    """Which is completed for a block of two sites over five sources."""
    blocks = [x, x.sin(), x.cos(), x.tanh()]
    partial = attnres(blocks, QUERY) @ WEIGHT
    branch = torch.sin(attnres([*blocks, partial], QUERY) @ WEIGHT)
    read = torch.cos(branch)
    blocks = [*blocks, partial + branch]
    partial = attnres(blocks, QUERY) @ WEIGHT
    return attnres([*blocks, partial], QUERY), read.square() + x.square()


@pytest.mark.parametrize("model", [branch_of_a_site, branch_of_a_source])
def test_what_reads_a_row_is_computed_before_it_is_written_over(
    model: Callable[[Tensor], Results],
) -> None:
    """The result of the loop that reads a branch is asked for after the site."""
    x = torch.ones(6, 8, dtype=torch.float64).cumsum(0).requires_grad_()
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        actual = torch.compile(model, backend="attnres", fullgraph=True)(x)
    for one, other in zip(actual, model(x), strict=True):
        assert relative_error(one, other) < 1e-12
