"""The mix and its gradient in plain PyTorch, for every device, dtype and layout.

``ops.py`` has the formulas of the gradient, ``reference.py`` the specification. Shapes below: N
sources, D channels, ``tokens`` a source's shape without its channel dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnres_compile.kernels.reference import arithmetic_dtype


def mix(
    sources: Sequence[Tensor], query: Tensor, gain: Tensor | None, eps: float, count: bool, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What the operator returns, with one temporary of the size of a source."""
    coefficients, logits, inverse_rms = _attend(sources, query, gain, eps, count, dim)
    # One accumulator instead of a stack: each source is read where it lies.
    mixed = torch.zeros_like(sources[0], dtype=logits.dtype)
    for source, coefficient in zip(sources, coefficients, strict=True):
        mixed.addcmul_(source.to(logits.dtype), coefficient)
    return mixed.to(sources[0].dtype), logits, inverse_rms


def mix_backward(
    grad: Tensor,
    sources: Sequence[Tensor],
    weight: Tensor,
    logits: Tensor,
    inverse_rms: Tensor,
    count: bool,
    dim: int,
    wanted: Sequence[int],
    wants_weight: bool,
) -> list[Tensor]:
    """The gradients of the sources ``wanted`` and then, if ``wants_weight``, that of ``weight``."""
    dim = from_the_end(dim, grad)
    grad = grad.to(logits.dtype)
    product = torch.empty_like(grad)  # one temporary for all sources
    slopes = torch.stack([torch.mul(grad, source, out=product).sum(dim) for source in sources])
    del product
    alphas = torch.softmax(logits, dim=0)
    coefficients = alphas * len(sources) if count else alphas
    grad_logits = softmax_backward(alphas, slopes)
    if count:
        grad_logits = grad_logits * len(sources)
    towards_weight = grad_logits * inverse_rms
    towards_source = towards_weight * inverse_rms * logits / -grad.shape[dim]

    grads = []
    for i in wanted:
        total = torch.empty_like(sources[i], dtype=grad.dtype)
        torch.mul(grad, coefficients[i].unsqueeze(dim), out=total)
        total.addcmul_(sources[i].to(grad.dtype), towards_source[i].unsqueeze(dim))
        total.addcmul_(_along(weight, dim), towards_weight[i].unsqueeze(dim))
        grads.append(total.to(sources[i].dtype))
    if wants_weight:
        grad_weight = torch.zeros_like(weight)
        for source, coefficient in zip(sources, towards_weight.unbind(), strict=True):
            grad_weight += _sum_over_tokens(source.to(grad.dtype), coefficient, dim)
        grads.append(grad_weight)
    return grads


def decomposition(
    sources: Sequence[Tensor], query: Tensor, gain: Tensor | None, eps: float, count: bool, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``attnres::mix`` spelled in operators of PyTorch's own; differentiable.

    For exported programs that have to run without this package::

        program.run_decompositions({torch.ops.attnres.mix.default: decomposition})

    Args:
        sources: N tensors of one shape, dtype and device.
        query: [D].
        gain: [D] or None.
        eps: added to the mean squares.
        count: multiply the mix by N (``aggregate="sum"``).
        dim: the channel dimension.

    Returns:
        The mix (like ``sources[0]``), and logits and inverse RMS, both [N, *tokens] in the
        arithmetic dtype.
    """
    # Cast once, so that the gradients of both uses of a value are added before they are rounded.
    values = [source.to(arithmetic_dtype(source.dtype)) for source in sources]
    coefficients, logits, inverse_rms = _attend(values, query, gain, eps, count, dim)
    mixed = values[0] * coefficients[0]
    for value, coefficient in zip(values[1:], coefficients[1:], strict=True):
        mixed = mixed + value * coefficient
    return mixed.to(sources[0].dtype), logits, inverse_rms


def _attend(
    sources: Sequence[Tensor], query: Tensor, gain: Tensor | None, eps: float, count: bool, dim: int
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """What to multiply each source by, and the logits and inverse RMS that this comes from."""
    dtype = arithmetic_dtype(sources[0].dtype)
    weight = effective_query(query, gain, dtype)
    dim = from_the_end(dim, sources[0])
    squares, projections = [], []
    for source in sources:
        value = source.to(dtype)
        squares.append(_sum_of_squares(value, dim))
        projections.append(_project(value, weight, dim))
    inverse_rms = torch.rsqrt(torch.stack(squares) / sources[0].shape[dim] + eps)
    logits = torch.stack(projections) * inverse_rms
    coefficients = torch.softmax(logits, dim=0).unsqueeze(dim)
    if count:
        coefficients = coefficients * len(sources)
    return coefficients.unbind(), logits, inverse_rms


def softmax_backward(weights: Tensor, slopes: Tensor) -> Tensor:
    """The gradients of logits from those of their softmax, both [N, ...].

    ``a_i (t_i - sum_j a_j t_j)``, with all t counted from that of the largest weight: where this
    weight is close to one, so is its t to the sum, and of their difference few digits would be
    left.
    """
    slopes = slopes - slopes.gather(0, weights.argmax(0, keepdim=True))
    return weights * (slopes - (weights * slopes).sum(0))


def effective_query(query: Tensor, gain: Tensor | None, dtype: torch.dtype) -> Tensor:
    query = query.to(dtype)
    return query if gain is None else query * gain.to(dtype)


def from_the_end(dim: int, source: Tensor) -> int:
    """``dim`` as a negative number, which means the same with and without a leading dimension."""
    return dim if dim < 0 else dim - source.ndim


# With the channels last, norms and matrix products need no temporary of the size of a source;
# in other layouts they would copy or stride, and element-wise operators are several times faster.


def _sum_of_squares(value: Tensor, dim: int) -> Tensor:
    """The sum over the channels of ``value`` squared, [*tokens]."""
    if dim != -1:
        return value.square().sum(dim)
    norm: Tensor = torch.linalg.vector_norm(value, dim=-1)
    return norm.square()


def _project(value: Tensor, weight: Tensor, dim: int) -> Tensor:
    """The scalar product of each token's channels with ``weight``, [*tokens]."""
    if dim == -1:
        return value @ weight
    return (value * _along(weight, dim)).sum(dim)


def _sum_over_tokens(value: Tensor, coefficient: Tensor, dim: int) -> Tensor:
    """The sum over tokens of ``coefficient * value``, [D]."""
    if dim == -1:
        return coefficient.flatten() @ value.reshape(-1, value.shape[-1])
    tokens = [d for d in range(-value.ndim, 0) if d != dim]
    return (value * coefficient.unsqueeze(dim)).sum(tokens)


def _along(vector: Tensor, dim: int) -> Tensor:
    """``vector`` [D] as a view that broadcasts along ``dim``, counted from the end."""
    return vector.view(-1, *[1] * (-dim - 1))
