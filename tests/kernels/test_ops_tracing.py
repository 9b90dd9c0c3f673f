"""attnres::mix under everything that traces: fake and meta tensors, Dynamo, Inductor, export."""

import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule

from attnres_compile.errors import InputError
from attnres_compile.functional import attnres
from attnres_compile.kernels import ops, plain_mix
from mix_cases import MixCase, assert_case_matches, make_case
from tolerances import assert_matches

MIX = torch.ops.attnres.mix.default
MIX_BACKWARD = torch.ops.attnres.mix_backward.default


class Site(torch.nn.Module):
    """A site as a user would write it."""

    def __init__(self, width: int, dim: int = -1) -> None:
        super().__init__()
        self.query = torch.nn.Parameter(torch.linspace(-1, 1, width))
        self.gain = torch.nn.Parameter(torch.linspace(2, 1, width))
        self.dim = dim

    def forward(self, sources: list[Tensor]) -> Tensor:
        mixed = attnres(sources, self.query, self.gain, aggregate="sum", dim=self.dim)
        return mixed.tanh()


def channels_last(case: MixCase) -> MixCase:
    for source in case.sources:
        source.data = source.data.contiguous(memory_format=torch.channels_last)
    return case


def transposed(case: MixCase) -> MixCase:
    """Tokens as a patch embedding leaves them: ``conv(x).flatten(2).transpose(1, 2)``."""
    for source in case.sources:
        source.data = source.data.transpose(1, 2).contiguous().transpose(1, 2)
    return case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        make_case(3, (2, 3, 8)),
        make_case(1, (2, 3, 8)),
        make_case(3, (8,), with_gain=False),
        make_case(2, (2, 8, 3, 4), dim=1),
        channels_last(make_case(2, (2, 8, 3, 4), dim=-3)),
        transposed(make_case(3, (2, 5, 8))),
    ],
    ids=["tokens", "one-source", "one-token", "images", "channels-last", "transposed"],
)
def test_opcheck(case: MixCase, dtype: torch.dtype) -> None:
    sources = list(case.to(dtype).sources)
    torch.library.opcheck(MIX, (sources, case.query, case.gain, 1e-6, True, case.dim))
    sources[0].requires_grad_(False)
    torch.library.opcheck(MIX, (sources, case.query, case.gain, 1e-6, False, case.dim))
    with torch.no_grad():
        mixed, *statistics = MIX(sources, case.query, case.gain, 1e-6, True, case.dim)
        weight = case.query.detach().to(statistics[0].dtype)
        for wanted, wants_weight in [([*range(len(sources))], True), ([0], False)]:
            arguments = (mixed, sources, weight, *statistics, True, case.dim, wanted, wants_weight)
            torch.library.opcheck(MIX_BACKWARD, arguments)


@pytest.mark.parametrize("dim", [-1, 1])
def test_a_mix_is_laid_out_as_its_first_source(dim: int) -> None:
    """Whoever reads it may ask for a view."""
    sources = transposed(make_case(3, (2, 8, 8))).sources
    mixed = attnres(sources, torch.zeros(8), dim=dim)
    assert mixed.transpose(1, 2).view(2, 64).shape == (2, 64)
    grads = torch.autograd.grad(mixed.sum(), sources)
    assert all(
        grad.stride() == source.stride() for grad, source in zip(grads, sources, strict=True)
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_for_all_sizes(backend: str) -> None:
    graphs: list[GraphModule] = []

    def counting(graph: GraphModule, inputs: Sequence[Tensor]) -> object:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    @torch.compile(backend=counting, fullgraph=True)
    def mix(sources: list[Tensor], query: Tensor, gain: Tensor | None, **_: object) -> Tensor:
        return attnres(sources, query, gain, aggregate="sum")

    for tokens in [(2, 3), (4, 5), (7, 2), (3, 9)]:
        assert_case_matches(make_case(3, (*tokens, 48)), mix)
    assert len(graphs) == 2  # one for the first size, and one for all others
    assert targets(graphs[1]).count(torch.ops.attnres.mix) == 1


@pytest.mark.parametrize("layout", ["tokens", "channels-last"])
def test_inductor(layout: str) -> None:
    case = make_case(3, (2, 3, 48))
    if layout == "channels-last":
        case = channels_last(make_case(3, (2, 48, 3, 5), dim=1))

    def mix(sources: list[Tensor], query: Tensor, gain: Tensor | None, **options: object) -> Tensor:
        # Neighbours that Inductor fuses, and whose layout it is free to choose.
        return 2 * ops.mix([sources[0] / 2, *sources[1:]], query, gain, **options)

    compiled = torch.compile(mix, fullgraph=True)
    expected = case.run(mix)
    for name, result in case.run(compiled).items():
        assert_matches(result, expected[name], name=name)


def test_compiled_backward_keeps_no_copy_of_a_source() -> None:
    case = make_case(5, (4, 8, 64))
    saved: list[Tensor] = []
    compiled = torch.compile(attnres, backend="aot_eager", fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        compiled(list(case.sources), case.query, case.gain)
    pointers = {source.data_ptr() for source in case.sources}
    large = [tensor for tensor in saved if tensor.numel() >= case.grad.numel()]
    assert len(large) == 5
    assert {tensor.data_ptr() for tensor in large} == pointers


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_statistics_have_no_gradient(backend: str) -> None:
    case = make_case(3, (4, 48))
    compiled = torch.compile(MIX, backend=backend, fullgraph=True)
    arguments = (list(case.sources), case.query, case.gain, 1e-6, True, -1)
    for result, statistic in zip(compiled(*arguments), MIX(*arguments), strict=True):
        assert torch.equal(result, statistic)
        assert result.requires_grad == statistic.requires_grad


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("shape", "dim"), [((2, 3, 8), -1), ((2, 8, 3, 4), 1)])
def test_export_and_decomposition(shape: tuple[int, ...], dim: int, strict: bool) -> None:
    sources = [torch.randn(shape) for _ in range(3)]
    batch = torch.export.Dim("batch", min=1)
    site = Site(8, dim)
    program = torch.export.export(
        site, (sources,), dynamic_shapes=[[{0: batch}] * 3], strict=strict
    )
    assert targets(program.graph_module).count(MIX) == 1
    plain = program.run_decompositions({MIX: plain_mix.decomposition})
    assert not any("attnres" in str(target) for target in targets(plain.graph_module))
    larger = [torch.randn(5, *shape[1:]) for _ in range(3)]
    for exported in (program, plain):
        assert_matches(exported.module()(larger), site(larger), name="exported")


def test_decomposed_export_trains() -> None:
    sources = [torch.randn(2, 3, 8) for _ in range(3)]
    site = Site(8)
    program = torch.export.export(site, (sources,))
    exported = program.run_decompositions({MIX: plain_mix.decomposition}).module()
    for module in (site, exported):
        module(sources).sum().backward()
    for name, parameter in exported.named_parameters():
        assert_matches(parameter.grad, site.get_parameter(name).grad, name=name)


def targets(graph_module: GraphModule) -> list[object]:
    return [node.target for node in graph_module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_meta_and_fake_tensors(dtype: torch.dtype) -> None:
    case = make_case(3, (2, 8, 3, 4), dim=1, dtype=dtype)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(tensor) for tensor in case.tensors().values()]
    meta = [tensor.detach().to("meta").requires_grad_() for tensor in case.tensors().values()]
    for *sources, query, gain in (fake, meta):
        mixed, logits, inverse_rms = MIX(sources, query, gain, 1e-6, True, 1)
        assert (mixed.shape, mixed.dtype) == ((2, 8, 3, 4), dtype)
        assert (logits.shape, logits.dtype) == ((3, 2, 3, 4), statistics)
        assert (inverse_rms.shape, inverse_rms.dtype) == ((3, 2, 3, 4), statistics)
        mixed.sum().backward()
        for tensor in (*sources, query, gain):
            assert tensor.grad is not None
            assert (tensor.grad.shape, tensor.grad.dtype) == (tensor.shape, dtype)


def test_arguments_are_checked_while_tracing() -> None:
    sources = [torch.zeros(2, 4, device="meta"), torch.zeros(2, 5, device="meta")]
    with pytest.raises(InputError, match=r"source 1 has shape \(2, 5\)"):
        ops.mix(sources, torch.zeros(4, device="meta"), None, eps=1e-6, aggregate="sum")


def test_reload() -> None:
    # In a process of its own, since others hold on to the operators registered here.
    script = """
import importlib, sys, torch
from attnres_compile.kernels import ops
importlib.reload(ops)
del sys.modules["attnres_compile.kernels.ops"]
again = importlib.import_module("attnres_compile.kernels.ops")
assert again is not ops
source = torch.ones(2, 3, requires_grad=True)
for module in (ops, again):
    mixed = module.mix([source, source], torch.zeros(3), None, eps=1e-6, aggregate="sum")
    (grad,) = torch.autograd.grad(mixed.sum(), source)
    assert torch.allclose(grad, torch.full((2, 3), 2.0)), grad
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
