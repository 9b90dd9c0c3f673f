"""The C++ library for CPUs: sites as in the specification, in every dtype it is made for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import phase_cases
from attnres_compile.errors import BackendError
from attnres_compile.kernels import cpp_library, phases
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


@pytest.fixture(autouse=True)
def _one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """C++ has no phase 1: cases of any number of sources are mixed in one pass."""
    monkeypatch.setattr(phase_cases, "ONE_PASS", 99)


@pytest.mark.parametrize("dtype", cpp_library.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_outputs_and_gradients_are_the_specifications(
    case: PhaseCase, dtype: torch.dtype, threads: int
) -> None:
    """Autograd adds up what every site gives a source, in bfloat16 with a rounding a site."""
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
def test_where_one_source_has_nearly_all_the_weight(case: PhaseCase) -> None:
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


def site(sources: list[Tensor], kernels: str, **other: Any) -> Tensor:
    """The mix of a site without a norm."""
    query = torch.linspace(-1, 1, sources[0].shape[-1])
    before = (other.get("before"), other.get("statistics"))
    rest = (query, 1e-6, 1.0, "none", None, None, 0.0, None, True, -1, kernels)
    mixed: Tensor = phases.phase2(*before, sources, [], *rest)[1]
    return mixed


def test_rows_that_lie_apart_are_read_as_they_are() -> None:
    sources = [torch.randn(6, 5, 16).transpose(0, 1) for _ in range(2)]
    assert relative_error(site(sources, "cpp"), site(sources, "reference")) < 2e-6


def test_phase_1_has_no_form_in_cpp() -> None:
    source, queries = torch.randn(5, 16), torch.randn(3, 16)
    with pytest.raises(BackendError, match="kernels='cpp' is unknown; use one of"):
        phases.complete([source], queries, 1e-6, -1, "cpp")
    with pytest.raises(BackendError, match="what phase 1 has found needs kernels='reference'"):
        site([source], "cpp", before=source, statistics=torch.randn(2, 5))


def test_unknown_implementations_raise() -> None:
    with pytest.raises(BackendError, match="kernels='rust' is unknown"):
        site([torch.randn(2, 4)], "rust")
