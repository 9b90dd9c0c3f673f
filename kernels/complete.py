"""The operator ``attnres::complete``: a source is complete, so score it for all sites to come.

The queries of later sites are parameters, known before their blocks begin. So the logits of a
source are formed while its rows are on chip to be summed, and nobody has to read a source just to
score it. With ``s`` the sum, rounded to its dtype, ``r`` its inverse RMS, ``w_j`` the query (times
gain) of site j and ``l_j`` its logit::

    r = rsqrt(mean(s^2) + eps)      l_j = r (w_j . s)
    ds = dsource + r sum_j dl_j w_j - (r^2 / D) (sum_j dl_j l_j) s
    dw_j = sum over tokens of dl_j r s

For a single addend ``source`` is a stand-in, and the third addend may be one: ``stand_ins.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnres_compile.kernels.implementations import (
    differentiate_once,
    implementation,
    tokens_of,
    without_autocast,
)
from attnres_compile.kernels.stand_ins import share, stand_in


@torch.library.custom_op(
    "attnres::complete",
    mutates_args=(),
    schema=(
        "(Tensor[] addends, Tensor queries, float eps, int dim, str kernels)"
        " -> (Tensor source, Tensor logits, Tensor inverse_rms)"
    ),
)
def complete(
    addends: Sequence[Tensor], queries: Tensor, eps: float, dim: int, kernels: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Complete a source and score it.

    Args:
        addends: 1 or 2 tensors of one shape and floating dtype, and perhaps a stand-in.
        queries: [L, D] in the arithmetic dtype, queries times gains, L >= 1.
        eps: added to the mean square of the source.
        dim: the channel dimension.
        kernels: "reference", "triton" or, with the channels last, "cpp".

    Returns:
        The source, like an addend; logits [L, *tokens] and inverse RMS [*tokens] in the arithmetic
        dtype. The inverse RMS has no gradient.
    """
    with without_autocast(queries):
        result: tuple[Tensor, Tensor, Tensor]
        result = implementation(kernels).complete(addends, queries, eps, dim)
        return result


@complete.register_fake
def _complete_fake(
    addends: Sequence[Tensor], queries: Tensor, eps: float, dim: int, kernels: str
) -> tuple[Tensor, Tensor, Tensor]:
    first = addends[0]
    source = stand_in(first) if len(addends) == 1 else first.new_empty(first.shape)
    tokens = tokens_of(first, dim)
    return source, queries.new_empty((queries.shape[0], *tokens)), queries.new_empty(tokens)


@torch.library.custom_op(
    "attnres::complete_backward",
    mutates_args=(),
    schema=(
        "(Tensor? grad_source, Tensor grad_logits, Tensor source, Tensor queries, Tensor logits,"
        " Tensor inverse_rms, int dim, bool wants_source, bool wants_queries, str kernels)"
        " -> Tensor[]"
    ),
)
def complete_backward(
    grad_source: Tensor | None,
    grad_logits: Tensor,
    source: Tensor,
    queries: Tensor,
    logits: Tensor,
    inverse_rms: Tensor,
    dim: int,
    wants_source: bool,
    wants_queries: bool,
    kernels: str,
) -> list[Tensor]:
    """The gradients of the source and of the queries, those that are wanted."""
    with without_autocast(queries):
        grads: list[Tensor] = implementation(kernels).complete_backward(
            grad_source,
            grad_logits,
            source,
            queries,
            logits,
            inverse_rms,
            dim,
            wants_source,
            wants_queries,
        )
        return grads


@complete_backward.register_fake
def _complete_backward_fake(
    grad_source: Tensor | None,
    grad_logits: Tensor,
    source: Tensor,
    queries: Tensor,
    logits: Tensor,
    inverse_rms: Tensor,
    dim: int,
    wants_source: bool,
    wants_queries: bool,
    kernels: str,
) -> list[Tensor]:
    grads = [source.new_empty(source.shape)] if wants_source else []
    return [*grads, torch.empty_like(queries)] if wants_queries else grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    addends, queries, _, ctx.dim, ctx.kernels = inputs
    source, logits, inverse_rms = output
    ctx.mark_non_differentiable(inverse_rms)
    ctx.set_materialize_grads(False)
    data = addends[0] if len(addends) == 1 else source
    ctx.save_for_backward(data, queries, logits, inverse_rms)


def _backward(
    ctx: Any, grad_source: Tensor | None, grad_logits: Tensor | None, _: None
) -> tuple[Any, ...]:
    source, queries, logits, inverse_rms = ctx.saved_tensors
    needs_addends, needs_queries, *_ = ctx.needs_input_grad
    nothing = (None, None, None)
    if grad_logits is None:
        return share(grad_source, needs_addends), None, *nothing
    wants_source = any(needs_addends)
    grads = torch.ops.attnres.complete_backward(
        grad_source,
        grad_logits,
        source,
        queries,
        logits,
        inverse_rms,
        ctx.dim,
        wants_source,
        needs_queries,
        ctx.kernels,
    )
    grad_addend = grads[0] if wants_source else None
    return share(grad_addend, needs_addends), grads[-1] if needs_queries else None, *nothing


complete.register_autograd(_backward, setup_context=_setup_context)
differentiate_once(complete_backward)
