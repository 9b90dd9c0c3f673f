"""The six phases of Block Attention Residuals in plain PyTorch: clear rather than fast.

``complete.py``, ``phase1.py`` and ``phase2.py`` say what each one is; the functions here and those
of ``triton_phases.py`` have the same names, arguments and results. Composed they give
``reference.mix``: a softmax over all sources can be taken in two parts, as long as the log of the
sum of exponentials of each part is known (online softmax; Milakov and Gimelshein, arXiv
1805.02867; for this purpose Kimi Team, arXiv 2603.15031, section 4).

Shapes below: D channels along ``dim``, ``tokens`` a source's shape without ``dim``, n sources, S
sites of a block, L sites of all later blocks. "Rows" are channels last: [*tokens, D].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnres_compile.kernels.plain_mix import softmax_backward
from attnres_compile.kernels.reference import arithmetic_dtype
from attnres_compile.kernels.stand_ins import stand_in


def complete(
    addends: Sequence[Tensor], queries: Tensor, eps: float, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of one or two ``addends``, and its logits towards ``queries`` [L, D].

    Returns:
        The source; logits [L, *tokens]; inverse RMS [*tokens]. For one addend the source is a
        stand-in for it (see ``stand_ins.py``).
    """
    source = add(addends)
    rows = _rows(source, dim)
    inverse_rms = _inverse_rms(rows, eps)
    logits = (rows @ queries.T).movedim(-1, 0) * inverse_rms
    return source if len(addends) > 1 else stand_in(source), logits.contiguous(), inverse_rms


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
    """The gradients of the source and of the queries, those that are wanted."""
    rows = _rows(source, dim)
    towards_query = grad_logits * inverse_rms  # [L, *tokens]
    grads = []
    if wants_source:
        towards_self = (grad_logits * logits).sum(0) * inverse_rms.square() / rows.shape[-1]
        total = towards_query.movedim(0, -1) @ queries - towards_self.unsqueeze(-1) * rows
        if grad_source is not None:
            total = total + _rows(grad_source, dim)
        grads.append(_source(total, dim, source.dtype))
    if wants_queries:
        grads.append(towards_query.reshape(len(queries), -1) @ rows.reshape(-1, rows.shape[-1]))
    return grads


def phase1(
    sources: Sequence[Tensor], logits: Sequence[Tensor], dim: int
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The mixes of n ``sources`` for the S sites of a block, ``logits`` being n times [S, *tokens].

    Returns:
        S mixes like a source; statistics [S, 2, *tokens] whose first column is the logarithm of
        the sum of the exponentials of the logits, and the second zero; the weights [n, S, *tokens].
    """
    stacked = torch.stack(list(logits))  # [n, S, *tokens]
    alphas = torch.softmax(stacked, dim=0)
    mixes = []
    for site in range(stacked.shape[1]):
        mixed = torch.zeros_like(_rows(sources[0], dim))
        for source, alpha in zip(sources, alphas[:, site], strict=True):
            mixed.addcmul_(_rows(source, dim), alpha.unsqueeze(-1))
        mixes.append(_source(mixed, dim, sources[0].dtype))
    log_sums = torch.logsumexp(stacked, dim=0)
    return mixes, torch.stack([log_sums, torch.zeros_like(log_sums)], dim=1), alphas


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
    """The gradients of the carriers ``wanted``, and then that of all logits, [n, S, *tokens].

    ``grad_mixes`` are those of ``sites``, and ``grad_carriers`` those of the carriers
    ``arrived``; all others are zero.
    """
    rows = [_rows(grad, dim) for grad in grad_mixes]
    incoming = dict(zip(arrived, grad_carriers, strict=True))
    grads = []
    for i in wanted:
        total = torch.zeros_like(_rows(sources[i], dim))
        if i in incoming:
            total += _rows(incoming[i], dim)
        for site, row in zip(sites, rows, strict=True):
            total.addcmul_(row, weights[i, site].unsqueeze(-1))
        grads.append(_source(total, dim, sources[i].dtype))
    if wants_logits:
        slopes = torch.zeros_like(weights)
        for i, source in enumerate(sources):
            for site, row in zip(sites, rows, strict=True):
                slopes[i, site] = (row * _rows(source, dim)).sum(-1)
        grads.append(softmax_backward(weights, slopes) + weights * grad_statistics[:, 0])
    return grads


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
    norm_dtype: torch.dtype,
    wants_mix: bool,
    dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One site: the partial sum, its mix and the norm of that; ``phase2.py`` has the formulas."""
    partial = add(addends) if addends else None
    direct = [*sources] if partial is None else [*sources, partial]
    values = [_rows(value, dim) for value in direct]
    inverse = [_inverse_rms(value, eps) for value in values]
    logits = [(value @ query) * scale for value, scale in zip(values, inverse, strict=True)]
    like = direct[0] if before is None else before
    if before is not None:
        values.insert(0, _rows(before, dim))
    mixed = _mix(values, _betas(statistics, logits), count, like.dtype, dim)
    saved = [*logits, *inverse]
    normed = like.new_empty(0, dtype=norm_dtype)
    if norm != "none":
        centred, scale, mean = _normalise(_rows(mixed, dim), norm, norm_eps)
        saved += [scale] if mean is None else [scale, mean]
        result = centred * scale.unsqueeze(-1)
        if norm_weight is not None:
            result = result * norm_weight.to(result.dtype)
        if norm_bias is not None:
            result = result + norm_bias.to(result.dtype)
        normed = _source(result, dim, norm_dtype)
    statistics_shape = (0, *values[0].shape[:-1])
    return (
        _partial_result(like, addends, partial),
        mixed if wants_mix or norm == "none" else like.new_empty(0),
        normed,
        torch.stack(saved) if saved else values[0].new_empty(statistics_shape),
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
    """The gradients that are wanted, in this order.

    ``before`` and ``statistics``; the direct sources ``wanted``, of which the partial sum is the
    last; the query; the weight and the bias of the norm in the arithmetic dtype.
    """
    direct = [*sources] if partial is None else [*sources, partial]
    like = direct[0] if before is None else before
    values = [_rows(value, dim) for value in direct]
    logits, inverse = list(saved[: len(direct)]), saved[len(direct) : 2 * len(direct)]
    members = values if before is None else [_rows(before, dim), *values]
    betas = _betas(statistics, logits)

    total = torch.zeros_like(members[0])
    if grad_mixed is not None:
        total += _rows(grad_mixed, dim)
    grad_weight = grad_bias = torch.zeros_like(query)
    if grad_normed is not None:
        scale = saved[2 * len(direct)].unsqueeze(-1)
        unit = _rows(_mix(members, betas, count, like.dtype, dim), dim)
        if norm == "layer":
            unit = unit - saved[2 * len(direct) + 1].unsqueeze(-1)
        unit = unit * scale
        arriving = _rows(grad_normed, dim)
        grad_weight = _over_tokens(arriving * unit)
        grad_bias = _over_tokens(arriving)
        if norm_weight is not None:
            arriving = arriving * norm_weight.to(arriving.dtype)
        slope = arriving - unit * (arriving * unit).mean(-1, keepdim=True)
        if norm == "layer":
            slope = slope - arriving.mean(-1, keepdim=True)
        total += scale * slope
    total *= count

    slopes = torch.stack([(total * member).sum(-1) for member in members])
    grad_logits = softmax_backward(betas, slopes)
    grads = []
    if wants_before:
        grads.append(_source(betas[0].unsqueeze(-1) * total, dim, like.dtype))
        grads.append(torch.stack([grad_logits[0], betas[0] * slopes[0]]))
    first = len(members) - len(direct)
    grad_query = torch.zeros_like(query)
    for k, value in enumerate(values):
        towards_query = (grad_logits[first + k] * inverse[k]).unsqueeze(-1)
        grad_query = grad_query + _over_tokens(towards_query * value)
        if k not in wanted:
            continue
        towards_self = (inverse[k] * logits[k] / value.shape[-1]).unsqueeze(-1) * towards_query
        grad = betas[first + k].unsqueeze(-1) * total + towards_query * query
        grad = grad - towards_self * value
        if grad_partial is not None and k == len(sources):
            grad = grad + _rows(grad_partial, dim)
        grads.append(_source(grad, dim, like.dtype))
    vectors = [(grad_query, wants_query), (grad_weight, wants_weight), (grad_bias, wants_bias)]
    return grads + [vector for vector, needed in vectors if needed]


def add(addends: Sequence[Tensor]) -> Tensor:
    """The sum of the first two, rounded to their dtype; a third one only receives a gradient."""
    total = addends[0] if len(addends) == 1 else addends[0] + addends[1]
    return total.contiguous()


def _partial_result(like: Tensor, addends: Sequence[Tensor], partial: Tensor | None) -> Tensor:
    if partial is None:
        return like.new_empty(0)
    return partial if len(addends) > 1 else stand_in(partial)


def _betas(statistics: Tensor | None, logits: list[Tensor]) -> Tensor:
    """The softmax over phase 1's result and the direct sources, [members, *tokens]."""
    first = [] if statistics is None else [statistics[0]]
    return torch.softmax(torch.stack([*first, *logits]), dim=0)


def _mix(
    members: list[Tensor], betas: Tensor, count: float, dtype: torch.dtype, dim: int
) -> Tensor:
    mixed = torch.zeros_like(members[0])
    for member, beta in zip(members, betas, strict=True):
        mixed.addcmul_(member, beta.unsqueeze(-1))
    return _source(count * mixed, dim, dtype)


def _normalise(rows: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows less their mean if ``norm`` is "layer", what to multiply them by, and the mean."""
    if norm == "rms":
        return rows, _inverse_rms(rows, eps), None
    mean = rows.mean(-1)
    centred = rows - mean.unsqueeze(-1)
    return centred, _inverse_rms(centred, eps), mean


def _inverse_rms(rows: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(rows.square().mean(-1) + eps)


def _over_tokens(rows: Tensor) -> Tensor:
    return rows.reshape(-1, rows.shape[-1]).sum(0)


def _rows(source: Tensor, dim: int) -> Tensor:
    """[*tokens, D] in the arithmetic dtype."""
    return source.movedim(dim, -1).to(arithmetic_dtype(source.dtype))


def _source(rows: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """The rows laid out as a source and rounded to ``dtype``."""
    return rows.movedim(-1, dim).to(dtype).contiguous()
