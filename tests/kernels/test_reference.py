"""The specification: against PyTorch's own RMSNorm, known numbers and its own laws."""

import doctest

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from attnres_compile.kernels import reference
from mix_cases import assert_case_matches, make_case
from tolerances import TOLERANCE, assert_matches, relative_error


def in_terms_of_rms_norm(
    sources: list[Tensor],
    query: Tensor,
    gain: Tensor | None,
    *,
    eps: float,
    aggregate: str,
    dim: int,
) -> Tensor:
    """The paper's listing over channels-last sources, with PyTorch's RMSNorm for the keys."""
    values = [source.movedim(dim, -1) for source in sources]
    logits = [rms_norm(value, query.shape, gain, eps) @ query for value in values]
    alphas = torch.stack(logits, dim=-1).softmax(dim=-1).unbind(dim=-1)
    mixed = sum(alpha[..., None] * value for alpha, value in zip(alphas, values, strict=True))
    return (mixed * len(sources) if aggregate == "sum" else mixed).movedim(-1, dim)


def test_known_numbers() -> None:
    # With RMS one the keys are the sources themselves: logits ln 3 and 0, weights 3/4 and 1/4.
    sources = [torch.tensor([1.0, 1.0]), torch.tensor([1.0, -1.0])]
    query = torch.tensor([0.5, 0.5]) * torch.tensor(3.0).log()
    weights = reference.depth_weights(sources, query, None, eps=1e-12)
    torch.testing.assert_close(weights, torch.tensor([0.75, 0.25]))
    mean = reference.mix(sources, query, None, eps=1e-12, aggregate="mean")
    torch.testing.assert_close(mean, torch.tensor([1.0, 0.5]))
    total = reference.mix(sources, query, None, eps=1e-12, aggregate="sum")
    torch.testing.assert_close(total, torch.tensor([2.0, 1.0]))


@pytest.mark.parametrize("aggregate", ["sum", "mean"])
@pytest.mark.parametrize("with_gain", [True, False], ids=["gain", "no-gain"])
@pytest.mark.parametrize(
    ("num_sources", "shape", "dim"),
    [(1, (2, 3, 48), -1), (3, (2, 3, 48), 2), (9, (5, 1), -1), (4, (2, 6, 3, 2), 1), (2, (7,), 0)],
)
def test_agrees_with_rms_norm(
    num_sources: int, shape: tuple[int, ...], dim: int, with_gain: bool, aggregate: str
) -> None:
    options = {"aggregate": aggregate, "with_gain": with_gain, "dtype": torch.float64}
    case = make_case(num_sources, shape, dim=dim, **options)
    expected = case.run(in_terms_of_rms_norm)
    for name, result in case.run(reference.mix).items():
        assert_matches(result, expected[name], name=name)


@pytest.mark.parametrize("drop", ["gain", "count", "norm"])
def test_a_wrong_formula_is_told_apart(drop: str) -> None:
    case = make_case(3, (2, 3, 48), dtype=torch.float64)

    def wrong(sources: list[Tensor], query: Tensor, gain: Tensor, **options: object) -> Tensor:
        if drop == "gain":
            gain = 0 * gain + 1
        if drop == "count":
            options["aggregate"] = "mean"
        if drop == "norm":
            options["eps"] = 1.0
        return in_terms_of_rms_norm(sources, query, gain, **options)  # type: ignore[arg-type]

    expected = case.run(wrong)
    results = case.run(reference.mix)
    assert all(relative_error(results[name], expected[name]) > 1e-3 for name in expected)


def test_weights_are_a_distribution_over_the_sources() -> None:
    case = make_case(5, (2, 6, 3, 4), dim=1)
    weights = reference.depth_weights(case.sources, case.query, case.gain, eps=case.eps, dim=1)
    assert weights.shape == (5, 2, 3, 4)
    assert (weights > 0).all()
    assert_matches(weights.sum(0), torch.ones(2, 3, 4), name="sum of the weights")


def test_only_query_times_gain_matters() -> None:
    case = make_case(4, (3, 16), dtype=torch.float64)
    assert case.gain is not None
    folded = reference.depth_weights(case.sources, case.query * case.gain, None, eps=case.eps)
    weights = reference.depth_weights(case.sources, case.query, case.gain, eps=case.eps)
    assert_matches(weights, folded, name="weights")


def test_the_size_of_a_source_does_not_move_its_weight() -> None:
    case = make_case(3, (3, 16), dtype=torch.float64)
    grown = [case.sources[0] * 1000, *case.sources[1:]]
    weights = reference.depth_weights(case.sources, case.query, case.gain, eps=1e-16)
    assert_matches(
        reference.depth_weights(grown, case.query, case.gain, eps=1e-16), weights, name="weights"
    )


def test_eps_keeps_zero_sources_finite() -> None:
    zero = torch.zeros(2, 8, requires_grad=True)
    query = torch.ones(8, requires_grad=True)
    mixed = reference.mix([zero, torch.ones(2, 8)], query, None, eps=1e-6, aggregate="mean")
    grads = torch.autograd.grad(mixed.sum(), [zero, query])
    assert all(tensor.isfinite().all() for tensor in (mixed, *grads))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("aggregate", ["sum", "mean"])
def test_one_source_is_returned_as_it_is(aggregate: str, dtype: torch.dtype) -> None:
    case = make_case(1, (3, 48), dtype=dtype, aggregate=aggregate)
    results = case.run(reference.mix)
    assert torch.equal(results["mixed"], case.sources[0])
    assert torch.equal(results["sources[0]"], case.grad)
    assert not results["query"].any()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rounds_once_at_the_end(dtype: torch.dtype) -> None:
    assert_case_matches(make_case(9, (2, 3, 96), dtype=dtype), reference.mix)


def test_gradcheck() -> None:
    case = make_case(3, (2, 5), dtype=torch.float64)

    def function(query: Tensor, gain: Tensor, *sources: Tensor) -> Tensor:
        return reference.mix(sources, query, gain, eps=1e-6, aggregate="sum")

    inputs = (case.query, case.gain, *case.sources)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_autocast_changes_nothing() -> None:
    case = make_case(3, (4, 48))
    plain = case.run(reference.mix)
    with torch.autocast("cpu", torch.bfloat16):
        cast = case.run(reference.mix)
    assert all(torch.equal(plain[name], cast[name]) for name in plain)


def test_no_sources_is_an_error() -> None:
    with pytest.raises(ValueError, match="no sources to mix; pass at least one tensor"):
        reference.mix([], torch.zeros(4), None, eps=1e-6, aggregate="sum")


def test_docstring_examples() -> None:
    failures, examples = doctest.testmod(reference)
    assert failures == 0
    assert examples > 0
