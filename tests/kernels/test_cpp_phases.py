"""The C++ library for CPUs: the phases as in the specification, in every dtype it is made for."""

from __future__ import annotations

import pytest
import torch

import phase_cases
from attnres_compile.errors import BackendError
from attnres_compile.kernels import cpp_library, cpp_phases, phases
from phase_cases import SHARP, PhaseCase, by_phases
from tolerances import relative_error

CASES = [
    PhaseCase(1, (2,), (3, 48)),
    PhaseCase(2, (3, 2), (3, 48), norm="layer"),
    PhaseCase(3, (4, 2, 1), (2, 2, 47), wants_mix=True),
    PhaseCase(8, (6, 1), (257, 64), norm="none"),
    PhaseCase(3, (2, 2), (5, 1000), affine=False, count=False),
    PhaseCase(33, (24,), (1, 16)),
]
TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 1.6e-2}


# From how many sources on a block gets a phase 1: as the compiler does it on a CPU, and never.
SCHEDULES = pytest.mark.parametrize("one_pass", [2, 99], ids=["two-phases", "one-pass"])


@pytest.mark.parametrize("dtype", cpp_library.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
@SCHEDULES
def test_outputs_and_gradients_are_the_specifications(
    case: PhaseCase,
    dtype: torch.dtype,
    threads: int,
    one_pass: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one pass autograd adds up what every site gives a source, rounding a site in bfloat16."""
    monkeypatch.setattr(phase_cases, "ONE_PASS", one_pass)
    roundings = 2 if dtype == torch.bfloat16 else 1
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    expected = case.expected(dtype)
    found = case.run(by_phases("cpp", True), dtype)
    torch.set_num_threads(before)
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert found.keys() == expected.keys()
    assert max(errors.values()) < roundings * TOLERANCES[dtype], errors


@pytest.mark.parametrize("case", SHARP, ids=str)
@SCHEDULES
def test_where_one_source_has_nearly_all_the_weight(
    case: PhaseCase, one_pass: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phase_cases, "ONE_PASS", one_pass)
    expected = case.expected(torch.float32)
    found = case.run(by_phases("cpp", True), torch.float32)
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) < 2e-6, errors


def test_two_runs_are_bitwise_equal() -> None:
    first, second = (CASES[3].run(by_phases("cpp"), torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradients_of_what_needs_them() -> None:
    case = CASES[2]
    frozen = {"root", "first1", "query0.1", "weight0.0", "branch0.0", "branch0.1", "second2"}
    tensors = case.tensors(torch.float32)
    for name in frozen:
        tensors[name].requires_grad_(False)
    found = case.run_on(by_phases("cpp"), tensors)
    expected = case.expected(torch.float32)
    assert found.keys() == {name for name in expected if name.removeprefix("d") not in frozen}
    assert all(relative_error(found[name], expected[name]) < 2e-6 for name in found)


def test_a_gradient_of_the_partial_sum_alone_goes_on_as_it_is() -> None:
    """Somebody wants gradients of a site that nobody has read."""
    sources, partial, query = list(torch.randn(2, 4, 8)), torch.randn(4, 8), torch.randn(8)
    rest = (query, 1.0, "rms", torch.ones(8))
    site = (query, 1e-6, 1.0, "rms", torch.ones(8), None, 1e-6, None, True, -1)
    *_, saved = cpp_phases.phase2(None, None, sources, [partial], *site)
    arrived = torch.randn(4, 8)
    wanted = (-1, False, [0, 1, 2], True, False, False)
    grads = cpp_phases.phase2_backward(
        arrived, None, None, None, None, sources, partial, *rest, saved, *wanted
    )
    zeros = torch.zeros(4, 8)
    for grad, expected in zip(grads, [zeros, zeros, arrived, zeros[0]], strict=True):
        assert torch.equal(grad, expected)


def test_rows_that_lie_apart_are_read_as_they_are() -> None:
    source = torch.randn(6, 5, 16).transpose(0, 1)
    arguments = (1e-6, -1)
    queries = torch.randn(3, 16)
    _, logits, _ = phases.complete([source], queries, *arguments, "cpp")
    _, expected, _ = phases.complete([source], queries, *arguments, "reference")
    assert relative_error(logits, expected) < 2e-6


def test_unknown_implementations_raise() -> None:
    with pytest.raises(BackendError, match="kernels='rust' is unknown"):
        phases.complete([torch.randn(2, 4)], torch.randn(1, 4), 1e-6, -1, "rust")
