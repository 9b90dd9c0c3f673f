"""The operator ``attnres::phase1``: all sites of a block attend over its completed sources, once.

The logits ``l_ij`` of source i towards site j are known (``complete.py``), so that the softmax is
a matter of scalars, and one streaming pass over the sources forms the mixes of all sites::

    a_ij = exp(l_ij - lse_j)      lse_j = log sum_i exp(l_ij)      o_j = sum_i a_ij s_i

**Gradients of the sources.** A source is read by every later block. To add those blocks' gradients
up costs three rows per block unless it is done where the rows are on chip anyway, so sources come
in twice: as data, without a gradient, and as *carriers*, without data. The gradient that arrives
at ``carriers_out[i]``, from later blocks, is added to this block's own and leaves through
``carriers[i]``. The first block to use a source passes the output of ``complete`` as its carrier::

    dcarrier_i = dcarrier_out_i + sum_j a_ij do_j
    dl_ij = a_ij (do_j . s_i - do_j . o_j + dlse_j)

Of up to 8 bfloat16 sources Triton saves a row: the newest need not be read for its ``dl``, since
``sum_i dl_ij = dlse_j``, and phase 2 has ``do_j . o_j`` at hand. It returns it as the gradient of
``statistics[j, 1]``, whose value is zero and means nothing. So mixes must be read by
``attnres::phase2``, with their statistics, and by nothing else: any other gradient of a mix would
lack that term. It costs digits, since on what the newest gets falls the rounding of ``o_j``, of the
size of all sources together: of 5 tokens and more, gradients of queries and branches were up to 1.8
times as far off as with all sources read; of a single token up to 4 times; and where an older
source has nearly all the weight, so that the queries get next to nothing, that is noise. Float16 is
held to 2e-3. So of float16 and float32, of more sources, and by the other kernels, all are read,
and with ``t_ij = do_j . s_i`` and r the source that has the largest weight::

    dl_ij = a_ij (t_ij - t_rj - sum_k a_kj (t_kj - t_rj) + dlse_j)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnres_compile.kernels.implementations import (
    differentiate_once,
    implementation,
    without_autocast,
)
from attnres_compile.kernels.stand_ins import stand_in


@torch.library.custom_op(
    "attnres::phase1",
    mutates_args=(),
    schema=(
        "(Tensor[] sources, Tensor[] carriers, Tensor[] logits, int dim, str kernels)"
        " -> (Tensor[] mixes, Tensor statistics, Tensor[] carriers_out, Tensor weights)"
    ),
)
def phase1(
    sources: Sequence[Tensor],
    carriers: Sequence[Tensor],
    logits: Sequence[Tensor],
    dim: int,
    kernels: str,
) -> tuple[list[Tensor], Tensor, list[Tensor], Tensor]:
    """Mix n completed sources for the S sites of a block.

    Args:
        sources: n tensors of one shape and floating dtype; get no gradient. The newest is last.
        carriers: n tensors of that shape whose values are not read; get the sources' gradients.
        logits: n tensors [S, *tokens] in the arithmetic dtype.
        dim: the channel dimension.
        kernels: "reference", "triton" or, with the channels last, "cpp".

    Returns:
        S mixes like a source; statistics [S, 2, *tokens], of which [:, 0] is the logarithm of the
        sum of the exponentials; n carriers for the next block; the a_ij, [n, S, *tokens], which
        the backward pass needs.
    """
    with without_autocast(sources[0]):
        mixes, statistics, weights = implementation(kernels).phase1(sources, logits, dim)
        return mixes, statistics, [stand_in(source) for source in sources], weights


@phase1.register_fake
def _phase1_fake(
    sources: Sequence[Tensor],
    carriers: Sequence[Tensor],
    logits: Sequence[Tensor],
    dim: int,
    kernels: str,
) -> tuple[list[Tensor], Tensor, list[Tensor], Tensor]:
    first = sources[0]
    sites, *tokens = logits[0].shape
    mixes = [first.new_empty(first.shape) for _ in range(sites)]
    statistics = logits[0].new_empty((sites, 2, *tokens))
    weights = logits[0].new_empty((len(sources), sites, *tokens))
    return mixes, statistics, [stand_in(source) for source in sources], weights


@torch.library.custom_op(
    "attnres::phase1_backward",
    mutates_args=(),
    schema=(
        "(Tensor[] grad_mixes, int[] sites, Tensor grad_statistics, Tensor[] grad_carriers,"
        " int[] arrived, Tensor[] sources, Tensor weights, int[] wanted, bool wants_logits,"
        " int dim, str kernels) -> Tensor[]"
    ),
)
def phase1_backward(
    grad_mixes: Sequence[Tensor],
    sites: Sequence[int],
    grad_statistics: Tensor,
    grad_carriers: Sequence[Tensor],
    arrived: Sequence[int],
    sources: Sequence[Tensor],
    weights: Tensor,
    wanted: Sequence[int],
    wants_logits: bool,
    dim: int,
    kernels: str,
) -> list[Tensor]:
    """The gradients of the carriers ``wanted``, and then that of all logits, [n, S, *tokens].

    ``grad_mixes`` are those of ``sites`` and ``grad_carriers`` those of the carriers ``arrived``;
    the others are zero, and so are gradients of the statistics of other sites: phase 2, which
    reads both, returns both.
    """
    with without_autocast(weights):
        grads: list[Tensor] = implementation(kernels).phase1_backward(
            grad_mixes,
            sites,
            grad_statistics,
            grad_carriers,
            arrived,
            sources,
            weights,
            wanted,
            wants_logits,
            dim,
        )
        return grads


@phase1_backward.register_fake
def _phase1_backward_fake(
    grad_mixes: Sequence[Tensor],
    sites: Sequence[int],
    grad_statistics: Tensor,
    grad_carriers: Sequence[Tensor],
    arrived: Sequence[int],
    sources: Sequence[Tensor],
    weights: Tensor,
    wanted: Sequence[int],
    wants_logits: bool,
    dim: int,
    kernels: str,
) -> list[Tensor]:
    grads = [sources[i].new_empty(sources[i].shape) for i in wanted]
    return [*grads, weights.new_empty(weights.shape)] if wants_logits else grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    sources, _, _, ctx.dim, ctx.kernels = inputs
    weights = output[3]
    ctx.mark_non_differentiable(weights)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(weights, *sources)


def _backward(
    ctx: Any,
    grad_mixes: Sequence[Tensor | None],
    grad_statistics: Tensor | None,
    grad_carriers: Sequence[Tensor | None],
    _: None,
) -> tuple[Any, ...]:
    weights, *sources = ctx.saved_tensors
    count, of_sites, *tokens = weights.shape
    _, needs_carriers, needs_logits, *_ = ctx.needs_input_grad
    wanted = [i for i, needed in enumerate(needs_carriers) if needed]
    sites = [j for j, grad in enumerate(grad_mixes) if grad is not None]
    arrived = [i for i in wanted if grad_carriers[i] is not None]
    if grad_statistics is None and not sites:  # nothing of this block is needed
        return [None] * count, list(grad_carriers), [None] * count, None, None
    if grad_statistics is None:
        grad_statistics = weights.new_zeros((of_sites, 2, *tokens))
    grads = torch.ops.attnres.phase1_backward(
        [grad_mixes[j] for j in sites],
        sites,
        grad_statistics,
        [grad_carriers[i] for i in arrived],
        arrived,
        sources,
        weights,
        wanted,
        any(needs_logits),
        ctx.dim,
        ctx.kernels,
    )
    by_carrier = dict(zip(wanted, grads, strict=False))
    grad_logits = grads[-1].unbind() if any(needs_logits) else [None] * count
    return (
        [None] * count,
        [by_carrier.get(i) for i in range(count)],
        [grad if n else None for grad, n in zip(grad_logits, needs_logits, strict=True)],
        None,
        None,
    )


phase1.register_autograd(_backward, setup_context=_setup_context)
differentiate_once(phase1_backward)
