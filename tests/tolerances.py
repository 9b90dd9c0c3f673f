"""How far two right implementations may lie apart, per dtype, in one place.

An error is measured against the largest magnitude of the expected tensor, so that elements near
zero, where terms cancel, do not ask for more digits than the arithmetic has.
"""

import torch
from torch import Tensor

TOLERANCE = {
    # Sums of up to about a thousand terms in another order: a few roundings of 1.1e-16, 6e-8.
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    # Computed in float32 and rounded once: at worst one neighbouring number, eps of the dtype.
    torch.float16: torch.finfo(torch.float16).eps,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest magnitude expected; inf if either is not finite."""
    actual, expected = actual.detach().double(), expected.detach().double()
    if not (actual.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    difference = (actual - expected).abs().max().item()
    largest = expected.abs().max().item()
    if difference == 0.0:
        return 0.0
    return difference / largest if largest else float("inf")


def assert_matches(actual: Tensor, expected: Tensor, *, name: str, factor: float = 1.0) -> None:
    """Same shape and dtype, and values within ``factor`` times the dtype's tolerance."""
    assert actual.shape == expected.shape, f"{name}: {actual.shape} is not {expected.shape}"
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype} is not {expected.dtype}"
    error = relative_error(actual, expected)
    allowed = factor * TOLERANCE[expected.dtype]
    assert error <= allowed, f"{name}: relative error {error:.2e} is above {allowed:.2e}"
