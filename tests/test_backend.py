"""torch.compile(converted, backend="attnres"): every choice of kernels against eager."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import backend_checks
from attnres_compile import AttnResConfig, convert, rewriting
from attnres_compile.errors import BackendError
from attnres_compile.functional import attnres
from attnres_compile.kernels import cpp_library, cpp_phases
from backend_checks import check_as_eager, check_training, compile_with, converted_model
from tolerances import relative_error
from workers import interpreting

HERE = Path(__file__).parent


OTHERS = ["vit", "preact_resnet", "gpt2", "t5", "transposed_tokens"]


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)]
)
def test_outputs_and_gradients_are_those_of_eager(name: str) -> None:
    check_as_eager(name, "auto")


@pytest.mark.parametrize("name", ["small_gpt", pytest.param("llama", marks=pytest.mark.slow)])
def test_the_reference_kernels(name: str) -> None:
    check_as_eager(name, "reference")


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("small_gpt", "auto"),
        ("vit", "auto"),
        pytest.param("llama", "auto", marks=pytest.mark.slow),
        pytest.param("llama", "reference", marks=pytest.mark.slow),
        pytest.param("vit", "reference", marks=pytest.mark.slow),
    ],
)
def test_training_gives_the_losses_of_eager(name: str, kernels: str) -> None:
    check_training(name, kernels)


def test_interpreted_triton_kernels() -> None:
    run_interpreted("small_gpt")


@pytest.mark.slow
@pytest.mark.parametrize(
    "check", ["llama", "gpt2", "vit", "t5", "preact_resnet", "transposed_tokens"]
)
def test_interpreted_triton_kernels_of_other_models(check: str) -> None:
    run_interpreted(check)


@pytest.mark.slow
@pytest.mark.parametrize("check", ["train-llama", "train-vit"])
def test_training_with_interpreted_triton_kernels(check: str) -> None:
    run_interpreted(check)


def run_interpreted(*checks: str) -> None:
    worker = subprocess.run(
        [sys.executable, str(HERE / "backend_checks.py"), *checks],
        env=interpreting(HERE),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert worker.returncode == 0, worker.stderr[-4000:]
    assert [f"passed {check}" for check in checks] == worker.stdout.splitlines()[-len(checks) :]


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_other_sizes_compile_at_most_once_more(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled_graphs = []
    rewrite = rewriting.rewrite_dynamo_graph

    def counting(*args: object) -> int:
        compiled_graphs.append(args)
        return rewrite(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("attnres_compile.backend.rewrite_dynamo_graph", counting)
    converted, _ = converted_model("llama")
    compiled = compile_with(converted, kernels)
    for shape in [(2, 9), (3, 17), (5, 6)]:
        ids = torch.randint(0, 50, shape)
        assert relative_error(compiled(ids).logits, converted(ids).logits) < 1e-5
    assert 1 <= len(compiled_graphs) <= 2


def ran_during(run: Callable[[], None]) -> set[str]:
    """Operators that ran. Compiled code calls the library's as such where profiles are to show."""
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    shown = torch._inductor.config.patch({"cpp.enable_kernel_profile": True})
    with shown, profiler as profile:
        run()
    return {event.key for event in profile.key_averages()}


@pytest.mark.slow  # a whole model; the next test has all functions run in CI
def test_the_cpp_library_really_computes() -> None:
    ran = ran_during(lambda: check_as_eager("small_gpt", "auto"))
    assert {"attnres::cpp_phase2", "attnres::cpp_phase2_backward"} <= ran


def test_blocks_of_many_sources_run_in_two_phases() -> None:
    weights = torch.randn(10, 8, 8) / 3
    queries = torch.randn(10, 8)

    def model(x: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """Five blocks of two sites."""
        sources, partial = [x], None
        for number, (weight, query) in enumerate(zip(weights, queries, strict=True)):
            mixed = attnres(sources if partial is None else [*sources, partial], query)
            branch = torch.tanh(mixed @ weight)
            partial = branch if partial is None else partial + branch
            if number % 2:
                sources, partial = [*sources, partial], None
        return attnres(sources, queries[0])

    def of(run: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        inputs = [torch.ones(5, 8).cumsum(0).sin().requires_grad_(), queries.requires_grad_()]
        result = run(*inputs)
        return [result, *torch.autograd.grad(result.square().sum(), inputs)]

    expected = of(model)
    found: list[torch.Tensor] = []
    ran = ran_during(lambda: found.extend(of(compile_with(model, "auto"))))
    phases = set(cpp_library.NAMES) - {"sum_tokens"}  # of biases, which this model lacks
    assert {f"attnres::cpp_{name}" for name in phases} <= ran
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))


def test_models_written_by_hand() -> None:
    root, query = torch.randn(3, 8), torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(8, 8)

    def model(x: torch.Tensor) -> torch.Tensor:
        sources = [x]
        for row in query.unbind():
            sources.append(torch.tanh(attnres(sources, row) @ weight))
        return attnres(sources, query[0], aggregate="sum")

    compiled = compile_with(model, "auto")
    assert relative_error(compiled(root), model(root)) < 1e-5


@pytest.mark.parametrize("clips", [True, False])
def test_queries_that_the_forward_clips_are_clipped_when_they_are_read(clips: bool) -> None:
    root, weight = torch.randn(5, 8), torch.randn(8, 8) / 3

    def model(queries: torch.Tensor) -> torch.Tensor:
        """Four sources, and two sites that attend over them; it clips before the second."""
        sources = [torch.sin(i * root @ weight) for i in range(1, 5)]
        partial = torch.tanh(attnres(sources, queries[0]) @ weight)
        if clips:
            queries.clamp_(-0.1, 0.1)
        return attnres([*sources, partial], queries[1])

    queries = torch.randn(2, 8)
    found: list[torch.Tensor] = []
    with torch.no_grad():
        expected = model(queries.clone())
        ran = ran_during(lambda: found.append(compile_with(model, "auto")(queries.clone())))
    assert relative_error(found[0], expected) < 1e-5
    assert ("attnres::cpp_phase1" in ran) != clips


def test_transposed_tokens_may_be_viewed() -> None:
    tokens, query = torch.randn(2, 8, 5).mT, torch.randn(8)

    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(attnres([x, torch.sin(x)], query).mT.view(-1, 5))

    def of(run: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        x = tokens.clone().requires_grad_()
        result = run(x)
        return result, *torch.autograd.grad(result.square().sum(), x)

    for found, expected in zip(of(compile_with(model, "auto")), of(model), strict=True):
        assert relative_error(found, expected) < 1e-5


def one_mix(x: torch.Tensor) -> torch.Tensor:
    return attnres([x, torch.sin(x)], torch.ones(8))


def test_unknown_kernels_are_an_error() -> None:
    with pytest.raises(Exception, match="kernels='cuda' is unknown; use one of") as caught:
        compile_with(one_mix, "cuda")(torch.randn(3, 8))
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), BackendError)


@pytest.mark.parametrize("name", ["max_autotun", "kernel"])
def test_unknown_options_are_an_error(name: str) -> None:
    compiled: Any = torch.compile(one_mix, backend="attnres", options={name: True})
    with pytest.raises(Exception, match=f"option '{name}' is neither 'kernels' nor") as caught:
        compiled(torch.randn(3, 8))
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), BackendError)


def test_an_unknown_mode_is_an_error() -> None:
    compiled: Any = torch.compile(one_mix, backend="attnres", mode="fastest")
    with pytest.raises(Exception, match="mode='fastest' is unknown; use one of") as caught:
        compiled(torch.randn(3, 8))
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), BackendError)
    compiled = torch.compile(one_mix, backend="attnres", mode="max-autotune-no-cudagraphs")
    assert compiled(torch.randn(3, 8)).shape == (3, 8)


def test_options_of_inductor_are_its_own() -> None:
    options = {"triton.cudagraphs": False, "max-autotune": False}
    compiled: Any = torch.compile(one_mix, backend="attnres", options=options)
    assert compiled(torch.randn(3, 8)).shape == (3, 8)


def test_views_that_inductor_calls_do_not_lose_their_values() -> None:
    """A matrix product reads a gradient by a view that is a call, before it is written over."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.one = nn.LayerNorm(32), nn.Linear(32, 32, bias=False)
            self.norm2, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.one(self.norm1(x))
            return x + self.down(torch.relu(self.up(self.norm2(x))))

    model = nn.Sequential(*[Layer() for _ in range(4)], nn.LayerNorm(32)).double()
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    converted = convert(model, (x,), config=AttnResConfig(num_blocks=3))
    for parameter in converted.attnres.parameters():
        nn.init.normal_(parameter, std=0.5)
    options: dict[str, Any] = {"fallback_by_default": True}
    compiled = torch.compile(converted, backend="attnres", fullgraph=True, options=options)
    weights, losses = list(converted.parameters()), torch.randn_like(x)
    expected = torch.autograd.grad((converted(x) * losses).sum(), weights)
    found = torch.autograd.grad((compiled(x) * losses).sum(), weights)
    assert max(map(relative_error, found, expected)) < 1e-12


def test_triton_on_a_cpu_is_an_error_outside_of_the_interpreter() -> None:
    with pytest.raises(Exception, match="kernels='triton' cannot run on cpu tensors"):
        compile_with(one_mix, "triton")(torch.randn(3, 8))


@pytest.mark.slow
def test_a_check_fails_when_the_values_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    run = cpp_phases.phase2

    def wrong(*args: object) -> object:
        partial, mixed, normed, saved = run(*args)  # type: ignore[arg-type]
        return partial, mixed, normed * 1.001, saved

    monkeypatch.setattr(cpp_phases, "phase2", wrong)
    with pytest.raises(AssertionError):
        backend_checks.check_as_eager("llama", "auto")
