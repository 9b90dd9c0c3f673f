"""The phases of Block Attention Residuals on a CPU, by a small C++ library compiled on first use.

The same six functions as in ``plain_phases.py``, with the same arguments and results, for sources
with the channels last. They make room for the results, and the library (``cpp_library.py``) fills
it. All else is operators of PyTorch, so that a function can be traced into a graph of its own
(``passes/inline_cpp_phases.py``).

Inductor could generate these loops, and does so when handed ``plain_phases.py``; but it generates
them for every site anew, which made the first call three to six times as long. The library serves
all sites, is compiled once per dtype on a machine, and runs as fast. Compiling it takes 15 to 20 s
on 2 cores, and up to 35 s where these are busy; Inductor's cache keeps it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnres_compile.kernels.cpp_library import operator
from attnres_compile.kernels.implementations import NORM_ROWS
from attnres_compile.kernels.reference import arithmetic_dtype
from attnres_compile.kernels.stand_ins import stand_in


def complete(
    addends: Sequence[Tensor], queries: Tensor, eps: float, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    first, *branch = [addend.contiguous() for addend in addends[:2]]
    total = torch.empty_like(first) if branch else None
    logits = queries.new_empty((len(queries), *first.shape[:-1]))
    inverse_rms = queries.new_empty(first.shape[:-1])
    operator("complete", first.dtype)(
        [first],
        branch[0] if branch else None,
        None,
        queries.contiguous(),
        len(queries),
        eps,
        total,
        logits,
        inverse_rms,
    )
    return stand_in(first) if total is None else total, logits, inverse_rms


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
) -> list[Tensor]:
    source, queries = source.contiguous(), queries.contiguous()
    grad = torch.empty_like(source) if wants_source else None
    grad_queries = torch.empty_like(queries) if wants_queries else None
    operator("complete_backward", source.dtype)(
        [source],
        _contiguous(grad_source),
        grad_logits.contiguous(),
        queries,
        len(queries),
        logits.contiguous(),
        inverse_rms.contiguous(),
        grad,
        grad_queries,
        None,
    )
    return [each for each in (grad, grad_queries) if each is not None]


def phase1(
    sources: Sequence[Tensor], logits: Sequence[Tensor], dim: int
) -> tuple[list[Tensor], Tensor, Tensor]:
    sources = [source.contiguous() for source in sources]
    logits = [logit.contiguous() for logit in logits]
    sites, *tokens = logits[0].shape
    mixes = [torch.empty_like(sources[0]) for _ in range(sites)]
    statistics = logits[0].new_empty((sites, 2, *tokens))
    weights = logits[0].new_empty((len(sources), sites, *tokens))
    operator("phase1", sources[0].dtype)(
        sources, len(sources), logits, sites, mixes, statistics, weights
    )
    return mixes, statistics, weights


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
) -> list[Tensor]:
    sources, weights = [source.contiguous() for source in sources], weights.contiguous()
    grads = [torch.empty_like(sources[i]) for i in wanted]
    grad_logits = torch.empty_like(weights) if wants_logits else None
    operator("phase1_backward", sources[0].dtype)(
        sources,
        len(sources),
        weights,
        weights.shape[1],
        [grad.contiguous() for grad in grad_mixes],
        sites,
        grad_statistics.contiguous(),
        [grad.contiguous() for grad in grad_carriers],
        arrived,
        grads,
        wanted,
        grad_logits,
    )
    return grads if grad_logits is None else [*grads, grad_logits]


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first = [] if before is None else [before]
    members = [tensor.contiguous() for tensor in (*first, *sources, *addends[:1])]
    branch = addends[1].contiguous() if len(addends) > 1 else None
    like = members[0]
    norm_dtype = norm_dtype or like.dtype
    partial = None if branch is None else torch.empty_like(like)
    mixed = torch.empty_like(like) if wants_mix or norm == "none" else None
    wide = norm_dtype != like.dtype
    made_dtype = arithmetic_dtype(like.dtype) if wide else like.dtype
    normed = torch.empty_like(like, dtype=made_dtype) if norm != "none" else None
    rows = 2 * (len(members) - len(first)) + NORM_ROWS[norm]
    saved = query.new_empty((rows, *like.shape[:-1]))
    operator("phase2", like.dtype)(
        members,
        len(members),
        _contiguous(statistics),
        branch,
        None,
        query.contiguous(),
        None,
        eps,
        count,
        NORM_ROWS[norm],
        _vector(norm_weight, query),
        _vector(norm_bias, query),
        norm_eps,
        wide,
        partial,
        mixed,
        normed,
        saved,
    )
    if partial is None:
        partial = stand_in(members[-1]) if addends else like.new_empty(0)
    return (
        partial,
        like.new_empty(0) if mixed is None else mixed,
        like.new_empty(0, dtype=norm_dtype) if normed is None else normed.to(norm_dtype),
        saved,
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
) -> list[Tensor]:
    first = [] if before is None else [before]
    last = [] if partial is None else [partial]
    members = [tensor.contiguous() for tensor in (*first, *sources, *last)]
    like = members[0]
    wide = grad_normed is not None and grad_normed.dtype != like.dtype
    if grad_normed is not None and wide:
        grad_normed = grad_normed.to(arithmetic_dtype(like.dtype))
    wanted_members = [0] * wants_before + [k + len(first) for k in wanted]
    grads = [torch.empty_like(like) for _ in wanted_members]
    grad_statistics = None
    if wants_before and statistics is not None:
        grad_statistics = torch.empty_like(statistics)
    wants = (wants_query, wants_weight, wants_bias)
    vectors = [query.new_empty(query.shape) if wants_it else None for wants_it in wants]
    operator("phase2_backward", like.dtype)(
        members,
        len(members),
        _contiguous(statistics),
        [] if grad_partial is None else [grad_partial.contiguous()],
        [] if grad_partial is None else [len(members) - 1],
        _contiguous(grad_mixed),
        _contiguous(grad_normed),
        wide,
        query.contiguous(),
        count,
        NORM_ROWS[norm],
        _vector(norm_weight, query),
        saved.contiguous(),
        grads,
        wanted_members,
        grad_statistics,
        *vectors,
        None,
    )
    if grad_statistics is not None:
        grads.insert(1, grad_statistics)
    return [*grads, *(vector for vector in vectors if vector is not None)]


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _vector(vector: Tensor | None, query: Tensor) -> Tensor | None:
    return None if vector is None else vector.to(query.dtype).contiguous()
