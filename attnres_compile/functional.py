"""Attention Residuals as a function, for people who write their own models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from attnres_compile.errors import InputError
from attnres_compile.kernels import ops


def attnres(
    sources: Sequence[Tensor],
    query: Tensor,
    gain: Tensor | None = None,
    *,
    eps: float = 1e-6,
    aggregate: Literal["sum", "mean"] = "mean",
    dim: int = -1,
) -> Tensor:
    """Mix the sources of one site: what its sublayer reads instead of the residual sum.

    ::

        alpha = softmax over the sources of  query . (gain * RMSNorm(source))
        mixed = c * sum of alpha * source       c = len(sources) for "sum", 1 for "mean"

    The sources are the root of the residual stream (the embedding), the sums of the completed
    blocks, and the partial sum of the block in progress, if it has one yet. Each sublayer output
    belongs into exactly one of them; do not pass cumulative states.

    The sources are neither stacked nor copied, and the backward pass keeps only references to
    them, so do not change one in place before it ran (PyTorch raises if you do). The arithmetic
    is done in float32, or in float64 for float64 sources, under autocast too.

    Args:
        sources: at least one tensor, all of one shape, floating dtype and device. A single source
            is returned as it is.
        query: [D], learnable; start it at zero, which weighs all sources alike.
        gain: [D], the learnable gain of the keys' RMSNorm, started at one; ``None`` for none.
        eps: added to the mean square of each source.
        aggregate: "mean" is the form of the paper and of Kimi K3. "sum" multiplies by the number
            of sources, so that a zero query gives the plain residual sum.
        dim: the channel dimension of size D: -1 for tokens [..., D], 1 for images [B, D, H, W].

    Returns:
        A tensor of the shape and dtype of a source, differentiable once in all tensors.

    Raises:
        InputError: when the arguments do not fit together; the message says what to change.
        NotImplementedError: under forward-mode derivatives and the transforms of ``torch.func``.

    Example:
        A model of two sublayers, with one source per sublayer:

        >>> import torch
        >>> from attnres_compile.functional import attnres
        >>> attention, mlp = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        >>> queries = torch.nn.Parameter(torch.zeros(2, 8))
        >>> embedding = torch.randn(2, 5, 8)
        >>> first = attention(embedding)  # a site with one source reads it as it is
        >>> second = mlp(attnres([embedding, first], queries[0]))
        >>> hidden = attnres([embedding, first, second], queries[1])
        >>> torch.allclose(hidden, (embedding + first + second) / 3, atol=1e-6)
        True
    """
    if isinstance(sources, Tensor):
        raise InputError(
            f"sources is one tensor of shape {tuple(sources.shape)}; pass a list of tensors, for "
            "a stacked one list(sources.unbind(0))."
        )
    sources = list(sources)  # of a generator, too
    for i, source in enumerate(sources):
        if not isinstance(source, Tensor):
            raise InputError(f"source {i} is a {type(source).__name__}; pass a tensor.")
    if not isinstance(query, Tensor):
        raise InputError(f"the query is a {type(query).__name__}; pass a tensor of shape [D].")
    if gain is not None and not isinstance(gain, Tensor):
        raise InputError(
            f"the gain is a {type(gain).__name__}; pass a tensor of shape [D] or None."
        )
    if aggregate not in ("sum", "mean"):
        raise InputError(f"aggregate must be 'sum' or 'mean', not {aggregate!r}.")
    if not eps > 0:
        raise InputError(f"eps must be positive, not {eps!r}; it keeps zero sources finite.")
    return ops.mix(sources, query, gain, eps=eps, aggregate=aggregate, dim=dim)
