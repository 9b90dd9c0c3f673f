"""The phases of Block Attention Residuals on a CPU, by a small C++ library compiled on first use.

The same six functions as in ``plain_phases.py``, with the same arguments and results, for sources
with the channels last. ``templates/phases.cpp`` holds the loops over tokens, ``templates/rows.h``
what they do with a row.

Inductor could generate these loops, and does so when handed ``plain_phases.py``; but it generates
them for every site anew, which made the first call three to six times as long. One library for all
sites takes a second to compile, is kept in Inductor's cache, and runs as fast.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from attnres_compile.kernels.phase2 import NORMS
from attnres_compile.kernels.plain_phases import stand_in
from attnres_compile.kernels.reference import arithmetic_dtype

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_SOURCES = [Path(__file__).parent / "templates" / name for name in ("rows.h", "phases.cpp")]
# Inductor vectorises by itself and has the compiler not do it; here the compiler shall.
_FLAGS = ("-ftree-loop-vectorize", "-ffp-contract=fast", "-fno-math-errno")
_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "d": ctypes.c_double, "i": ctypes.c_int}
_SIGNATURES = {
    "complete": "pppppp ld ll i",
    "complete_backward": "pppppppp l ll i",
    "phase1": "pppp ll ll i",
    "phase1_backward": "pppppppp ll ll i",
    "phase2": "pppl ppp dd i pp d pp i p ll i",
    "phase2_backward": "ppp i ppp l p d i pp pppp ll i",
}


@cache
def _function(name: str, dtype: torch.dtype) -> Callable[..., None]:
    from torch._inductor.codecache import CppCodeCache

    element = str(dtype).removeprefix("torch.")
    source = "\n".join(path.read_text() for path in _SOURCES)
    library = CppCodeCache.load(f"#define FOR_{element.upper()}\n{source}", extra_flags=_FLAGS)
    function = getattr(library, name)
    function.restype = None
    function.argtypes = [_TYPES[letter] for letter in _SIGNATURES[name].replace(" ", "")]
    return function  # type: ignore[no-any-return]


def prepare(dtype: torch.dtype) -> None:
    """Compiles the library for streams of `dtype`, so that a missing compiler shows at once."""
    _function("complete", dtype)


def complete(
    addends: Sequence[Tensor], queries: Tensor, eps: float, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    first, *others = [addend.contiguous() for addend in addends[:2]]
    width, tokens, threads = _sizes(first)
    source = torch.empty_like(first) if others else stand_in(first)
    logits = queries.new_empty((len(queries), *first.shape[:-1]))
    inverse_rms = queries.new_empty(first.shape[:-1])
    _function("complete", first.dtype)(
        _at(first),
        _at(others[0] if others else None),
        _at(source if others else None),
        _at(queries := queries.contiguous()),
        _at(logits),
        _at(inverse_rms),
        len(queries),
        eps,
        tokens,
        width,
        threads,
    )
    return source, logits, inverse_rms


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
    source, grad_logits = source.contiguous(), grad_logits.contiguous()
    queries, logits = queries.contiguous(), logits.contiguous()
    grad_source = None if grad_source is None else grad_source.contiguous()
    width, tokens, threads = _sizes(source)
    grad = torch.empty_like(source) if wants_source else None
    sums = queries.new_zeros((threads, *queries.shape)) if wants_queries else None
    _function("complete_backward", source.dtype)(
        _at(grad_source),
        _at(grad_logits),
        _at(source),
        _at(queries),
        _at(logits),
        _at(inverse_rms),
        _at(grad),
        _at(sums),
        len(queries),
        tokens,
        width,
        threads,
    )
    grads = [] if grad is None else [grad]
    return grads if sums is None else [*grads, sums.sum(0)]


def phase1(
    sources: Sequence[Tensor], logits: Sequence[Tensor], dim: int
) -> tuple[list[Tensor], Tensor]:
    sources = [source.contiguous() for source in sources]
    logits = [logit.contiguous() for logit in logits]
    width, tokens, threads = _sizes(sources[0])
    sites = len(logits[0])
    mixes = [torch.empty_like(sources[0]) for _ in range(sites)]
    statistics = logits[0].new_empty((sites, 2, *logits[0].shape[1:]))
    _function("phase1", sources[0].dtype)(
        _all(sources),
        _all(logits),
        _all(mixes),
        _at(statistics),
        len(sources),
        sites,
        tokens,
        width,
        threads,
    )
    return mixes, statistics


def phase1_backward(
    grad_mixes: Sequence[Tensor],
    sites: Sequence[int],
    grad_statistics: Tensor,
    grad_carriers: Sequence[Tensor],
    arrived: Sequence[int],
    sources: Sequence[Tensor],
    logits: Sequence[Tensor],
    statistics: Tensor,
    wanted: Sequence[int],
    wants_logits: bool,
    dim: int,
) -> list[Tensor]:
    sources = [source.contiguous() for source in sources]
    logits = [logit.contiguous() for logit in logits]
    width, tokens, threads = _sizes(sources[0])
    mixes = dict(zip(sites, (grad.contiguous() for grad in grad_mixes), strict=True))
    carriers = dict(zip(arrived, (grad.contiguous() for grad in grad_carriers), strict=True))
    grads = {i: torch.empty_like(sources[i]) for i in wanted}
    shape = (len(sources), *logits[0].shape)
    grad_logits = statistics.new_empty(shape) if wants_logits else None
    _function("phase1_backward", sources[0].dtype)(
        _all([mixes.get(j) for j in range(len(statistics))]),
        _at(grad_statistics := grad_statistics.contiguous()),
        _all([carriers.get(i) for i in range(len(sources))]),
        _all(sources),
        _all(logits),
        _at(statistics := statistics.contiguous()),
        _all([grads.get(i) for i in range(len(sources))]),
        _at(grad_logits),
        len(sources),
        len(statistics),
        tokens,
        width,
        threads,
    )
    results = [grads[i] for i in wanted]
    return results if grad_logits is None else [*results, grad_logits]


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
    before = None if before is None else before.contiguous()
    statistics = None if statistics is None else statistics.contiguous()
    direct = [tensor.contiguous() for tensor in (*sources, *addends[:1])]
    branch = addends[1].contiguous() if len(addends) > 1 else None
    like = direct[0] if before is None else before
    norm_dtype = norm_dtype or like.dtype
    width, tokens, threads = _sizes(like)
    weight, bias = _vector(norm_weight, query), _vector(norm_bias, query)
    partial = torch.empty_like(like) if branch is not None else None
    mixed = torch.empty_like(like) if wants_mix or norm == "none" else None
    normed = torch.empty_like(like, dtype=norm_dtype) if norm != "none" else None
    saved = query.new_empty((2 * len(direct) + NORMS.index(norm), *like.shape[:-1]))
    _function("phase2", like.dtype)(
        _at(before),
        _at(statistics),
        _all(direct),
        len(direct),
        _at(branch),
        _at(partial),
        _at(query := query.contiguous()),
        eps,
        count,
        NORMS.index(norm),
        _at(weight),
        _at(bias),
        norm_eps,
        _at(mixed),
        _at(normed),
        _is_wide(norm_dtype, like),
        _at(saved),
        tokens,
        width,
        threads,
    )
    if partial is None:
        partial = stand_in(direct[-1]) if addends else like.new_empty(0)
    return (
        partial,
        like.new_empty(0) if mixed is None else mixed,
        like.new_empty(0, dtype=norm_dtype) if normed is None else normed,
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
    arrived = [grad_partial, grad_mixed, grad_normed, before, statistics]
    grad_partial, grad_mixed, grad_normed, before, statistics = [
        None if tensor is None else tensor.contiguous() for tensor in arrived
    ]
    direct = [t.contiguous() for t in ([*sources] if partial is None else [*sources, partial])]
    like = direct[0] if before is None else before
    width, tokens, threads = _sizes(like)
    grad_before = torch.empty_like(like) if wants_before else None
    grad_statistics = saved.new_empty((2, *like.shape[:-1])) if wants_before else None
    grads = {k: torch.empty_like(like) for k in wanted}
    weight = _vector(norm_weight, query)
    sums = query.new_zeros((threads, 3, width))
    _function("phase2_backward", like.dtype)(
        _at(grad_partial),
        _at(grad_mixed),
        _at(grad_normed),
        grad_normed is not None and _is_wide(grad_normed.dtype, like),
        _at(before),
        _at(statistics),
        _all(direct),
        len(direct),
        _at(query := query.contiguous()),
        count,
        NORMS.index(norm),
        _at(weight),
        _at(saved := saved.contiguous()),
        _at(grad_before),
        _at(grad_statistics),
        _all([grads.get(k) for k in range(len(direct))]),
        _at(sums),
        tokens,
        width,
        threads,
    )
    results = [tensor for tensor in (grad_before, grad_statistics) if tensor is not None]
    results += [grads[k] for k in wanted]
    vectors = sums.sum(0).unbind()
    wants = (wants_query, wants_weight, wants_bias)
    return results + [v.clone() for v, wanted_too in zip(vectors, wants, strict=True) if wanted_too]


def _sizes(like: Tensor) -> tuple[int, int, int]:
    """Width, tokens, and how many threads share the tokens."""
    width = like.shape[-1]
    tokens = like.numel() // width if width else 0
    return width, tokens, max(1, min(torch.get_num_threads(), tokens))


def _vector(vector: Tensor | None, query: Tensor) -> Tensor | None:
    return None if vector is None else vector.to(query.dtype).contiguous()


def _is_wide(dtype: torch.dtype, like: Tensor) -> bool:
    """Whether normed rows are in the arithmetic dtype and not in that of the stream."""
    return dtype == arithmetic_dtype(like.dtype)


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _all(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*map(_at, tensors))
