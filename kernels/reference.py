"""The specification of the mix in plain PyTorch: clear rather than fast.

Every other implementation in this package is tested against these two functions, on the output
and on every gradient. The formula is that of "Attention Residuals" (Kimi Team, arXiv 2603.15031,
equations 1 to 6), with the learnable key gain and the float32 arithmetic of Kimi K3 (arXiv
2607.24653); the factor ``c`` of ``aggregate="sum"`` is this project's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Aggregate = Literal["sum", "mean"]


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sources of ``dtype`` are mixed in: float64 for itself, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def mix(
    sources: Sequence[Tensor],
    query: Tensor,
    gain: Tensor | None,
    *,
    eps: float,
    aggregate: Aggregate,
    dim: int = -1,
) -> Tensor:
    """Mix ``N`` sources by attention over depth, separately for every token.

    ::

        key_i   = gain * s_i * rsqrt(mean(s_i^2 over dim) + eps)
        alpha_i = softmax over i of (query . key_i)
        mixed   = c * sum_i alpha_i s_i        c = N for "sum", 1 for "mean"

    A single source is returned as it is, in either mode. With a zero query every alpha is ``1/N``,
    so that "sum" adds the sources up and "mean" averages them. Only ``query * gain`` matters.

    Args:
        sources: ``N >= 1`` tensors of one shape, floating dtype and device; ``D = shape[dim]``.
        query: [D], any floating dtype.
        gain: [D], the gain of the keys' RMSNorm; ``None`` stands for ones.
        eps: added to the mean square of each source.
        aggregate: "sum" or "mean".
        dim: the channel dimension: -1 for tokens [..., D], 1 for images [B, D, H, W].

    Returns:
        A tensor of the shape and dtype of ``sources[0]``. The arithmetic is done in float32 (in
        float64 for float64 sources) and rounded once, at the end. Differentiable in all tensors.

    Raises:
        ValueError: when ``sources`` is empty.
        RuntimeError: from PyTorch, when shapes do not fit.

    Example:
        >>> sources = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]])]
        >>> mix(sources, torch.zeros(2), None, eps=1e-6, aggregate="sum")
        tensor([[4., 1.]])
        >>> mix(sources, torch.zeros(2), None, eps=1e-6, aggregate="mean")
        tensor([[2.0000, 0.5000]])
    """
    weights = depth_weights(sources, query, gain, eps=eps, dim=dim)  # [N, *tokens]
    values = _channels_last(sources, dim)  # [N, *tokens, D]
    scale = len(sources) if aggregate == "sum" else 1
    mixed = scale * (weights.unsqueeze(-1) * values).sum(dim=0)  # [*tokens, D]
    return mixed.movedim(-1, dim).to(sources[0].dtype)


def depth_weights(
    sources: Sequence[Tensor],
    query: Tensor,
    gain: Tensor | None,
    *,
    eps: float,
    dim: int = -1,
) -> Tensor:
    """The depth attention ``alpha`` of ``mix``: how much each token takes from each source.

    Args:
        sources: as for ``mix``.
        query: as for ``mix``.
        gain: as for ``mix``.
        eps: as for ``mix``.
        dim: as for ``mix``.

    Returns:
        [N, *tokens], where ``tokens`` is the shape of a source without ``dim``; float32, or
        float64 for float64 sources. Sums to one over the first dimension. Differentiable.

    Raises:
        ValueError: when ``sources`` is empty.
        RuntimeError: from PyTorch, when shapes do not fit.

    Example:
        >>> sources = [torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 5.0]])]
        >>> depth_weights(sources, torch.zeros(2), None, eps=1e-6)
        tensor([[0.5000],
                [0.5000]])
        >>> depth_weights(sources, torch.tensor([9.0, 0.0]), None, eps=1e-6).round()
        tensor([[1.],
                [0.]])
    """
    values = _channels_last(sources, dim)  # [N, *tokens, D]
    keys = values * torch.rsqrt(values.square().mean(dim=-1, keepdim=True) + eps)
    if gain is not None:
        keys = gain.to(keys.dtype) * keys
    logits = (query.to(keys.dtype) * keys).sum(dim=-1)  # [N, *tokens]
    return torch.softmax(logits, dim=0)


def _channels_last(sources: Sequence[Tensor], dim: int) -> Tensor:
    """The sources as one tensor [N, *tokens, D] in the arithmetic dtype."""
    if not sources:
        raise ValueError("there are no sources to mix; pass at least one tensor.")
    dtype = arithmetic_dtype(sources[0].dtype)
    return torch.stack([source.movedim(dim, -1).to(dtype) for source in sources])
