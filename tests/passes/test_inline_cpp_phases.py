"""What becomes of sites in C++ in the graphs that Inductor lowers."""

from __future__ import annotations

import operator
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._subclasses import FakeTensorMode

from attnres_compile.functional import attnres
from attnres_compile.passes.inline_cpp_phases import InlineCppPhases
from tolerances import relative_error

SITES = ("phase2", "phase2_backward")
WRITING = {f"attnres.cpp_{name}.float32" for name in SITES}
PHASES = {f"attnres.{name}.default" for name in SITES}


@pytest.fixture
def targets(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The operators in every graph after the pass."""
    found: set[str] = set()
    inline = InlineCppPhases.__call__

    def watched(self: InlineCppPhases, graph: fx.Graph) -> None:
        inline(self, graph)
        graph.lint()
        found.update(str(node.target) for node in graph.nodes)

    monkeypatch.setattr(InlineCppPhases, "__call__", watched)
    return found


def errors(kernels: str, lengths: tuple[int, ...] = (5,), **options: Any) -> list[float]:
    """Of the output and two gradients of a network of two blocks, compiled; for each length."""
    weight, queries = torch.randn(8, 8), torch.randn(5, 8, requires_grad=True)

    def model(x: Tensor) -> Tensor:
        blocks, partial = [x, torch.sin(x), torch.cos(x)], x * 0
        for query in queries.unbind():
            partial = partial + torch.tanh(attnres([*blocks, partial], query) @ weight)
        return partial

    def run(function: Any, x: Tensor) -> list[Tensor]:
        y = function(x)
        return [y, *torch.autograd.grad(y.square().sum(), (x, queries))]

    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(
            model, backend="attnres", fullgraph=True, options={"kernels": kernels, **options}
        )
        pairs = []
        for length in lengths:
            x = torch.randn(length, 8, requires_grad=True)
            pairs += zip(run(compiled, x), run(model, x), strict=True)
    return [relative_error(actual, expected) for actual, expected in pairs]


class Seen(CustomGraphPass):
    """A pass of the user's own."""

    def __init__(self) -> None:
        self.targets: set[str] = set()

    def __call__(self, graph: fx.Graph) -> None:
        self.targets.update(str(node.target) for node in graph.nodes)

    def uuid(self) -> str:
        return "seen"


def test_a_compiled_graph_has_calls_that_write_to_its_own_memory(targets: set[str]) -> None:
    seen = Seen()
    found = errors("auto", lengths=(3, 7, 11), post_grad_custom_post_pass=seen)
    assert max(found) < 1e-5, found
    assert targets >= WRITING
    assert not targets & PHASES
    assert "aten.sym_size.int" in targets  # of the second graph, for any number of tokens
    assert seen.targets >= PHASES  # the user's pass ran, before


@pytest.mark.slow
def test_other_implementations_stay_as_they_are(targets: set[str]) -> None:
    assert max(errors("reference")) < 1e-5
    assert "attnres.mix.default" in targets
    assert not targets & (PHASES | WRITING)


def test_a_graph_without_phases_is_left_alone() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(torch.ops.aten.sin.default, (x,))
    graph.output(x)
    InlineCppPhases()(graph)
    assert [node.op for node in graph.nodes] == ["placeholder", "call_function", "output"]


def test_a_graph_out_of_order_is_put_in_order() -> None:
    mode, graph = FakeTensorMode(), fx.Graph()
    rest = (1e-6, 1.0, "none", None, None, 0.0, None, True, -1, "cpp")
    with mode:
        x, query = torch.empty(3, 8), torch.empty(8)
        values = torch.ops.attnres.phase2(None, None, [x], [], query, *rest)
    inputs = {"x": x, "query": query}
    nodes = {name: graph.placeholder(name) for name in inputs}
    arguments = (None, None, [nodes["x"]], [], nodes["query"], *rest)
    site = graph.call_function(torch.ops.attnres.phase2.default, arguments)
    mixed = graph.call_function(operator.getitem, (site, 1))
    reader = graph.call_function(torch.ops.aten.sin.default, (mixed,))
    graph.output(reader)
    made = {site: values, mixed: values[1], reader: values[1]}
    for node, value in ({nodes[name]: inputs[name] for name in inputs} | made).items():
        node.meta["val"] = value
    site.prepend(reader)
    InlineCppPhases()(graph)
    order = [str(node.target) for node in graph.nodes]
    assert order.index("attnres.cpp_phase2.float32") < order.index("aten.sin.default")


@pytest.mark.parametrize(
    ("dtype", "norm_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        pytest.param(torch.bfloat16, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_norms_in_other_dtypes(dtype: torch.dtype, norm_dtype: torch.dtype) -> None:
    queries = torch.randn(2, 8)
    weight = torch.randn(8, dtype=norm_dtype)

    def model(x: Tensor) -> Tensor:
        mixed = attnres([x, x + torch.sin(x)], queries[0])
        unit = mixed.float() * torch.rsqrt(mixed.float().square().mean(-1, keepdim=True) + 1e-5)
        return weight * unit.to(norm_dtype)

    x = torch.randn(5, 8).to(dtype).requires_grad_()
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(model, backend="attnres", fullgraph=True)
        actual, expected = compiled(x), model(x)
    assert actual.dtype == expected.dtype == norm_dtype
    assert relative_error(actual, expected) < 2e-2
    (grad,) = torch.autograd.grad(actual.float().square().sum(), x)
    (expected_grad,) = torch.autograd.grad(expected.float().square().sum(), x)
    assert relative_error(grad, expected_grad) < 4e-2


CACHED = """
import torch
from attnres_compile.functional import attnres

torch.manual_seed(0)
query, x = torch.randn(8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
def model(x):
    return attnres([x, torch.sin(x), x + torch.cos(x)], query)
compiled = torch.compile(model, backend="attnres", fullgraph=True)
(grad,) = torch.autograd.grad(compiled(x).square().sum(), x)
(expected,) = torch.autograd.grad(model(x).square().sum(), x)
torch.testing.assert_close(grad, expected)
print(torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.slow
def test_another_process_reads_compiled_graphs_from_the_cache(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    for name in ("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "TORCHINDUCTOR_FX_GRAPH_CACHE"):
        environment.pop(name, None)
    script = tmp_path / "cached.py"
    script.write_text(CACHED)
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, str(script)], env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[-1]) > 0
