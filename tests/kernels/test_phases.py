"""The operators of the phases in plain PyTorch: composed, they are the mix."""

import pytest
import torch

from attnres_compile.errors import BackendError, InputError
from attnres_compile.kernels import phases
from phase_cases import SHARP, PhaseCase, by_phases, by_specification
from tolerances import relative_error

CASES = [
    PhaseCase(1, (2,), (3, 48)),
    PhaseCase(2, (3, 2), (3, 48), norm="layer"),
    PhaseCase(3, (4, 2, 1), (2, 2, 48), wants_mix=True),
    PhaseCase(8, (6, 1), (3, 48), norm="none"),
    PhaseCase(4, (3, 3), (2, 20, 3, 2), dim=1, norm="layer", wants_mix=True),
    PhaseCase(3, (2, 2), (2, 20, 3), dim=-2, affine=False, count=False),
    PhaseCase(3, (3, 2), (20,), dim=0),
    PhaseCase(33, (2,), (2, 16)),
]


def assert_phases_match(
    case: PhaseCase, dtype: torch.dtype, kernels: str, tolerance: float, stand_ins: bool = True
) -> None:
    """Outputs and every gradient are those of the specification in float64."""
    expected = case.expected(dtype)
    found = case.run(by_phases(kernels, stand_ins), dtype)
    assert found.keys() == expected.keys()
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert not {name: error for name, error in errors.items() if not error <= tolerance}
    assert all(found[name].shape == expected[name].shape for name in expected)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("stand_ins", [True, False], ids=["stand-ins", "plain"])
def test_composed_they_are_the_mix(case: PhaseCase, stand_ins: bool) -> None:
    found = case.run(by_phases("reference", stand_ins), torch.float64)
    expected = case.run(by_specification, torch.float64)
    assert found.keys() == expected.keys()
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) < 1e-10, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_lower_precision(case: PhaseCase, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    assert_phases_match(case, dtype, "reference", tolerance)


@pytest.mark.parametrize("case", SHARP, ids=str)
def test_where_one_source_has_nearly_all_the_weight(case: PhaseCase) -> None:
    assert_phases_match(case, torch.float32, "reference", 2e-6)


def site_arguments(norm: str, *, before: bool, sources: int, addends: int) -> tuple[object, ...]:
    """Arguments of phase2 with gradients wanted for everything."""

    def leaf(*size: int) -> torch.Tensor:
        return torch.randn(size, requires_grad=True)

    return (
        leaf(3, 16) if before else None,
        leaf(2, 3) if before else None,
        [leaf(3, 16) for _ in range(sources)],
        [leaf(3, 16) for _ in range(addends)],
        leaf(16),
        1e-6,
        3.0,
        norm,
        None if norm == "none" else leaf(16),
        leaf(16) if norm == "layer" else None,
        1e-5,
        None,
        False,
        -1,
    )


def opcheck_complete(kernels: str) -> None:
    for addends in (1, 2, 3):
        leaves = [torch.randn(3, 16, requires_grad=True) for _ in range(addends)]
        queries = torch.randn(4, 16, requires_grad=True)
        torch.library.opcheck(phases.complete, (leaves, queries, 1e-6, -1, kernels))


def opcheck_phase1(kernels: str) -> None:
    sources = [torch.randn(3, 16) for _ in range(3)]
    carriers = [torch.randn(3, 16, requires_grad=True) for _ in range(3)]
    logits = [torch.randn(2, 3, requires_grad=True) for _ in range(3)]
    torch.library.opcheck(phases.phase1, (sources, carriers, logits, -1, kernels))


def opcheck_phase2(kernels: str) -> None:
    for norm, before, sources, addends in [
        ("rms", True, 0, 2),
        ("layer", False, 2, 1),
        ("none", True, 1, 3),
        ("none", False, 3, 0),
    ]:
        arguments = site_arguments(norm, before=before, sources=sources, addends=addends)
        torch.library.opcheck(phases.phase2, (*arguments, kernels))


@pytest.mark.parametrize("check", [opcheck_complete, opcheck_phase1, opcheck_phase2])
def test_opcheck(check: object) -> None:
    check("reference")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str) -> None:
    case = CASES[2]
    compute = by_phases("reference")
    compiled = torch.compile(
        lambda tensors: compute(case, tensors), backend=backend, fullgraph=True
    )
    expected = case.run(compute, torch.float32)
    found = case.run(lambda _, tensors: compiled(tensors), torch.float32)
    assert found.keys() == expected.keys()
    assert all(relative_error(found[name], expected[name]) < 2e-6 for name in expected)


def test_gradients_of_what_needs_them() -> None:
    case = CASES[2]
    frozen = {"root", "first1", "query0.1", "weight0.0", "branch0.0", "branch0.1", "second2"}
    tensors = case.tensors(torch.float32)
    for name in frozen:
        tensors[name].requires_grad_(False)
    found = case.run_on(by_phases("reference"), tensors)
    expected = case.expected(torch.float32)
    assert found.keys() == {name for name in expected if name.removeprefix("d") not in frozen}
    assert all(relative_error(found[name], expected[name]) < 2e-6 for name in found)


def test_unknown_arguments_are_errors() -> None:
    source, query = torch.ones(2, 4), torch.ones(4)
    rest = (query, 1e-6, 1.0, "none", None, None, 0.0, None, True, -1)
    with pytest.raises(BackendError, match="kernels='cuda' is unknown"):
        phases.phase2(None, None, [source], [], *rest, "cuda")
    with pytest.raises(InputError, match="nothing to mix"):
        phases.phase2(None, None, [], [], *rest, "reference")
    with pytest.raises(InputError, match="with its statistics"):
        phases.phase2(source, None, [], [], *rest, "reference")
