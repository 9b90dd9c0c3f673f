"""The operator ``attnres::phase2``: one site, from the last branch to the norm that reads it.

It adds the last branch to the partial sum, ``p = round(sum of addends)``, merges the partial sum
and any direct sources ``s_k`` with phase 1's result ``o`` by online softmax, and normalises::

    r_k = rsqrt(mean(s_k^2) + eps)      l_k = r_k (w . s_k)          the partial sum is one s_k
    beta = softmax over (lse of o, l_1, ...)      h = round(c (beta_0 o + sum_k beta_k s_k))
    y = round(norm(h))

Without phase 1's result it is the one-pass form, a plain mix of any number of sources. For the
backward pass it keeps references to its inputs, the partial sum and a few scalars per token:
``l_k``, ``r_k`` and, of the norm, the inverse RMS and the mean. With ``G`` the gradient of
``h / c`` times ``c``::

    a_k = G . s_k (a_0 = G . o)      dl_k = beta_k (a_k - sum_m beta_m a_m)      do = beta_0 G
    ds_k = beta_k G + dl_k (r_k w - r_k^2 l_k s_k / D)      dw = sum over tokens, k of dl_k r_k s_k

Where one beta is close to one, its ``a_k`` is close to their mean. So all of them are counted from
this ``a_k``: without that, the error of a query's gradient grows like ``1 / (1 - beta)``.

The gradient of ``statistics`` is ``dl_0`` and ``do . o``; ``phase1.py`` says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnres_compile.errors import InputError
from attnres_compile.kernels.implementations import (
    NORM_ROWS,
    differentiate_once,
    implementation,
    tokens_of,
    without_autocast,
)
from attnres_compile.kernels.stand_ins import share, stand_in


@torch.library.custom_op(
    "attnres::phase2",
    mutates_args=(),
    schema=(
        "(Tensor? before, Tensor? statistics, Tensor[] sources, Tensor[] addends, Tensor query,"
        " float eps, float count, str norm, Tensor? norm_weight, Tensor? norm_bias,"
        " float norm_eps, ScalarType? norm_dtype, bool wants_mix, int dim, str kernels)"
        " -> (Tensor partial, Tensor mixed, Tensor normed, Tensor saved)"
    ),
)
def phase2(
    before: Tensor | None,
    statistics: Tensor | None,
    sources: Sequence[Tensor],
    addends: Sequence[Tensor],
    query: Tensor,
    eps: float,
    count: float,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    norm_dtype: torch.dtype | None,
    wants_mix: bool,
    dim: int,
    kernels: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Update the partial sum, mix, and normalise.

    Args:
        before: phase 1's mix for this site, or None.
        statistics: [2, *tokens], phase 1's statistics for this site; None without ``before``.
        sources: K >= 0 completed sources that phase 1 has not seen.
        addends: 0 to 2 tensors whose sum is the partial sum, and perhaps a stand-in
            (``complete.py``).
        query: [D] in the arithmetic dtype, query times gain.
        eps: added to the mean square of a source.
        count: the factor c of the mix.
        norm: "none", "rms" or "layer".
        norm_weight: [D], any floating dtype, or None.
        norm_bias: as ``norm_weight``.
        norm_eps: added to the mean square, or variance, of the mix.
        norm_dtype: of ``normed``; None for that of the mix.
        wants_mix: whether somebody reads the mix itself.
        dim: the channel dimension.
        kernels: "reference", "triton" or, with the channels last, "cpp".

    Returns:
        The partial sum if there are two addends (a stand-in for a single one, else of shape [0]);
        the mix, of shape [0] unless wanted or ``norm`` is "none"; the normed mix, of shape [0] if
        ``norm`` is "none"; statistics [rows, *tokens] for the backward pass.
    """
    check_arguments(before, statistics, sources, addends, norm)
    like = _like(before, sources, addends)
    with without_autocast(query):
        result: tuple[Tensor, Tensor, Tensor, Tensor] = implementation(kernels).phase2(
            before,
            statistics,
            sources,
            addends,
            query,
            eps,
            count,
            norm,
            norm_weight,
            norm_bias,
            norm_eps,
            norm_dtype or like.dtype,
            wants_mix,
            dim,
        )
        return result


@phase2.register_fake
def _phase2_fake(
    before: Tensor | None,
    statistics: Tensor | None,
    sources: Sequence[Tensor],
    addends: Sequence[Tensor],
    query: Tensor,
    eps: float,
    count: float,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    norm_dtype: torch.dtype | None,
    wants_mix: bool,
    dim: int,
    kernels: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_arguments(before, statistics, sources, addends, norm)
    like = _like(before, sources, addends)
    shape, empty = like.shape, like.new_empty(0)
    partial = stand_in(like) if len(addends) == 1 else like.new_empty(shape)
    members = len(sources) + bool(addends)
    rows = 2 * members + NORM_ROWS[norm]
    return (
        partial if addends else empty,
        like.new_empty(shape) if wants_mix or norm == "none" else empty.clone(),
        like.new_empty(0 if norm == "none" else shape, dtype=norm_dtype or like.dtype),
        query.new_empty((rows, *tokens_of(like, dim))),
    )


@torch.library.custom_op(
    "attnres::phase2_backward",
    mutates_args=(),
    schema=(
        "(Tensor? grad_partial, Tensor? grad_mixed, Tensor? grad_normed, Tensor? before,"
        " Tensor? statistics, Tensor[] sources, Tensor? partial, Tensor query, float count,"
        " str norm, Tensor? norm_weight, Tensor saved, int dim, bool wants_before, int[] wanted,"
        " bool wants_query, bool wants_weight, bool wants_bias, str kernels) -> Tensor[]"
    ),
)
def phase2_backward(
    grad_partial: Tensor | None,
    grad_mixed: Tensor | None,
    grad_normed: Tensor | None,
    before: Tensor | None,
    statistics: Tensor | None,
    sources: Sequence[Tensor],
    partial: Tensor | None,
    query: Tensor,
    count: float,
    norm: str,
    norm_weight: Tensor | None,
    saved: Tensor,
    dim: int,
    wants_before: bool,
    wanted: Sequence[int],
    wants_query: bool,
    wants_weight: bool,
    wants_bias: bool,
    kernels: str,
) -> list[Tensor]:
    """The gradients that are wanted, in this order.

    ``before`` and ``statistics``; the direct sources ``wanted``, of which the partial sum is the
    last; the query; the weight and the bias of the norm in the arithmetic dtype.
    """
    with without_autocast(query):
        grads: list[Tensor] = implementation(kernels).phase2_backward(
            grad_partial,
            grad_mixed,
            grad_normed,
            before,
            statistics,
            sources,
            partial,
            query,
            count,
            norm,
            norm_weight,
            saved,
            dim,
            wants_before,
            wanted,
            wants_query,
            wants_weight,
            wants_bias,
        )
        return grads


@phase2_backward.register_fake
def _phase2_backward_fake(
    grad_partial: Tensor | None,
    grad_mixed: Tensor | None,
    grad_normed: Tensor | None,
    before: Tensor | None,
    statistics: Tensor | None,
    sources: Sequence[Tensor],
    partial: Tensor | None,
    query: Tensor,
    count: float,
    norm: str,
    norm_weight: Tensor | None,
    saved: Tensor,
    dim: int,
    wants_before: bool,
    wanted: Sequence[int],
    wants_query: bool,
    wants_weight: bool,
    wants_bias: bool,
    kernels: str,
) -> list[Tensor]:
    like = _like(before, sources, [] if partial is None else [partial])
    grads = [like.new_empty(like.shape) for _ in range(wants_before + len(wanted))]
    if wants_before:
        grads.insert(1, saved.new_empty((2, *saved.shape[1:])))
    return grads + [torch.empty_like(query) for _ in range(wants_query + wants_weight + wants_bias)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    before, statistics, sources, addends, query, _, ctx.scale, ctx.norm = inputs[:8]
    norm_weight, norm_bias, _, _, _, ctx.dim, ctx.kernels = inputs[8:]
    partial, mixed, normed, saved = output
    unused = [tensor for tensor in (partial, mixed, normed) if tensor.shape == (0,)]
    ctx.mark_non_differentiable(saved, *unused)
    ctx.set_materialize_grads(False)
    ctx.bias_dtype = None if norm_bias is None else norm_bias.dtype
    data = None if not addends else addends[0] if len(addends) == 1 else partial
    ctx.save_for_backward(before, statistics, data, query, norm_weight, saved, *sources)


def _backward(
    ctx: Any,
    grad_partial: Tensor | None,
    grad_mixed: Tensor | None,
    grad_normed: Tensor | None,
    _: None,
) -> tuple[Any, ...]:
    before, statistics, partial, query, norm_weight, saved, *sources = ctx.saved_tensors
    needs_before, needs_statistics, needs_sources, needs_addends, needs_query = (
        ctx.needs_input_grad[:5]
    )
    needs_weight, needs_bias = ctx.needs_input_grad[8:10]
    if grad_mixed is None and grad_normed is None:  # only the partial sum goes on
        addends = share(grad_partial, needs_addends)
        return None, None, [None] * len(sources), addends, *[None] * 11
    wants_before = needs_before or needs_statistics
    wanted = [k for k, needed in enumerate([*needs_sources, any(needs_addends)]) if needed]
    wants_vectors = [needs_query, needs_weight, needs_bias]
    if grad_normed is None:
        wants_vectors[1:] = [False, False]
    grads = torch.ops.attnres.phase2_backward(
        grad_partial,
        grad_mixed,
        grad_normed,
        before,
        statistics,
        sources,
        partial,
        query,
        ctx.scale,
        ctx.norm,
        norm_weight,
        saved,
        ctx.dim,
        wants_before,
        wanted,
        *wants_vectors,
        ctx.kernels,
    )
    left = iter(grads)
    grad_before, grad_statistics = (next(left), next(left)) if wants_before else (None, None)
    by_source = {k: next(left) for k in wanted}
    grad_query, grad_weight, grad_bias = (next(left) if w else None for w in wants_vectors)
    if grad_weight is not None:
        grad_weight = grad_weight.to(norm_weight.dtype)
    if grad_bias is not None:
        grad_bias = grad_bias.to(ctx.bias_dtype)
    return (
        grad_before,
        grad_statistics,
        [by_source.get(k) for k in range(len(sources))],
        share(by_source.get(len(sources)), needs_addends),
        grad_query,
        *[None] * 3,
        grad_weight,
        grad_bias,
        *[None] * 5,
    )


phase2.register_autograd(_backward, setup_context=_setup_context)
differentiate_once(phase2_backward)


def check_arguments(
    before: Tensor | None,
    statistics: Tensor | None,
    sources: Sequence[Tensor],
    addends: Sequence[Tensor],
    norm: str,
) -> None:
    """Raise InputError unless the arguments fit together."""
    if before is None and not sources and not addends:
        raise InputError("there is nothing to mix; pass a phase-1 result, sources or addends.")
    if (before is None) != (statistics is None):
        raise InputError("a phase-1 result comes with its statistics; pass both or neither.")
    if norm not in NORM_ROWS:
        raise InputError(f"norm={norm!r} is unknown; use one of {', '.join(NORM_ROWS)}.")


def _like(before: Tensor | None, sources: Sequence[Tensor], addends: Sequence[Tensor]) -> Tensor:
    """A tensor of the shape and dtype of the mix."""
    return before if before is not None else [*sources, *addends][0]
