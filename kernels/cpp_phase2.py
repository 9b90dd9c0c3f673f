"""One site of Block Attention Residuals on a CPU, by a small C++ library compiled on first use.

``phase2`` and its backward pass as in ``plain_phases.py``, with the same arguments and results, for
sources with the channels last and without a phase 1. They make room for the results, and the
library (``cpp_library.py``) fills it. All else is operators of PyTorch, so that a function can be
traced into a graph of its own: ``passes/inline_cpp_phase2.py``.

Inductor could generate these loops, and does so when handed ``plain_phases.py``; but it generates
them for every site anew, which made the first call three to six times as long. One library for all
sites takes a second to compile, is kept in Inductor's cache, and runs as fast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnres_compile.errors import BackendError
from attnres_compile.kernels.cpp_library import operator
from attnres_compile.kernels.phase2 import NORMS
from attnres_compile.kernels.plain_phases import stand_in
from attnres_compile.kernels.reference import arithmetic_dtype


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
    _check_alone(before, statistics)
    direct = [tensor.contiguous() for tensor in (*sources, *addends[:1])]
    branch = addends[1].contiguous() if len(addends) > 1 else None
    like = direct[0]
    norm_dtype = norm_dtype or like.dtype
    partial = None if branch is None else torch.empty_like(like)
    mixed = torch.empty_like(like) if wants_mix or norm == "none" else None
    wide = norm_dtype != like.dtype
    made_dtype = arithmetic_dtype(like.dtype) if wide else like.dtype
    normed = torch.empty_like(like, dtype=made_dtype) if norm != "none" else None
    saved = query.new_empty((2 * len(direct) + NORMS.index(norm), *like.shape[:-1]))
    operator("phase2", like.dtype)(
        direct,
        len(direct),
        branch,
        None,
        query.contiguous(),
        None,
        eps,
        count,
        NORMS.index(norm),
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
        partial = stand_in(direct[-1]) if addends else like.new_empty(0)
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
    _check_alone(before, statistics)
    direct = [t.contiguous() for t in ([*sources] if partial is None else [*sources, partial])]
    like = direct[0]
    wide = grad_normed is not None and grad_normed.dtype != like.dtype
    if grad_normed is not None and wide:
        grad_normed = grad_normed.to(arithmetic_dtype(like.dtype))
    grads = [torch.empty_like(like) for _ in wanted]
    wants = (wants_query, wants_weight, wants_bias)
    vectors = [query.new_empty(query.shape) if wants_it else None for wants_it in wants]
    operator("phase2_backward", like.dtype)(
        direct,
        len(direct),
        [] if grad_partial is None else [grad_partial.contiguous()],
        [] if grad_partial is None else [len(direct) - 1],
        _contiguous(grad_mixed),
        _contiguous(grad_normed),
        wide,
        query.contiguous(),
        count,
        NORMS.index(norm),
        _vector(norm_weight, query),
        saved.contiguous(),
        grads,
        wanted,
        *vectors,
        None,
    )
    return [*grads, *(vector for vector in vectors if vector is not None)]


def _check_alone(before: Tensor | None, statistics: Tensor | None) -> None:
    if before is not None or statistics is not None:
        raise BackendError(
            "kernels='cpp' mixes in one pass over all sources; what phase 1 has found needs "
            "kernels='reference' or 'triton'."
        )


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _vector(vector: Tensor | None, query: Tensor) -> Tensor | None:
    return None if vector is None else vector.to(query.dtype).contiguous()
