"""The phases of Block Attention Residuals by generated Triton kernels.

The same six functions as in ``plain_phases.py``, with the same arguments and results. Each chooses
specialisations, allocates results and launches; the formulas are in the templates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnres_compile.kernels import launch, specialise
from attnres_compile.kernels.arguments import Layout, accepted, contiguous, groups, named
from attnres_compile.kernels.implementations import NORM_ROWS
from attnres_compile.kernels.launch import Argument, check_device, runs
from attnres_compile.kernels.stand_ins import stand_in


def complete(
    addends: Sequence[Tensor], queries: Tensor, eps: float, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``plain_phases.complete``."""
    addends = contiguous(addends[:2])
    check_device(queries)
    layout = Layout(addends[0], dim)
    source = layout.source() if len(addends) == 2 else stand_in(addends[0])
    logits, inverse_rms = layout.statistics(len(queries)), layout.statistics()
    scored, scored_logits = addends, logits
    for group in groups(len(queries), specialise.MAX_SITES["complete"]):
        kernel = specialise.complete_forward(
            addends=len(scored),
            sites=len(group),
            width=layout.width,
            dtype=source.dtype,
            images=layout.images,
            eps=eps,
        )
        arguments = named("addend", scored) | {
            "queries": queries[group.start : group.stop].contiguous(),
            "logits": scored_logits[group.start : group.stop],
            "inverse_rms": inverse_rms,
            **layout.sizes(),
        }
        if len(scored) == 2:
            arguments["source"] = source
        launch.launch(kernel, (layout.chunks(kernel),), arguments)
        if len(scored) == 2:  # further groups of queries score what the first has stored
            scored = [source]
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
    """``plain_phases.complete_backward``."""
    source, grad_logits = source.contiguous(), grad_logits.contiguous()
    logits, inverse_rms = logits.contiguous(), inverse_rms.contiguous()
    check_device(queries)
    layout = Layout(source, dim)
    arriving = None if grad_source is None else grad_source.contiguous()
    grad_addend = layout.source() if wants_source else None
    grad_queries = []
    programs, run = runs(layout.tokens, 64, source, per_processor=1)
    for group in groups(len(queries), specialise.MAX_SITES["complete"]):
        kernel = specialise.complete_backward(
            sites=len(group),
            width=layout.width,
            dtype=source.dtype,
            images=layout.images,
            has_grad_source=arriving is not None,
            wants_source=wants_source,
            wants_queries=wants_queries,
        )
        part = slice(group.start, group.stop)
        arguments: dict[str, Argument] = {
            "source": source,
            "grad_logits": grad_logits[part],
            "inverse_rms": inverse_rms,
            "run": run,
            **layout.sizes(),
        }
        if grad_addend is not None:
            arguments |= {"queries": queries[part].contiguous(), "logits": logits[part]}
            arguments["grad_addend"] = grad_addend
            if arriving is not None:
                arguments["grad_source"] = arriving
        partials = launch.allocate(queries, programs, len(group), layout.width)
        if wants_queries:
            arguments["grad_queries"] = partials
        launch.launch(kernel, (programs, kernel.tiles), arguments)
        arriving = grad_addend  # further groups of queries add to what the first has stored
        if wants_queries:
            grad_queries.append(_sum_over_programs(partials))
    grads = [] if grad_addend is None else [grad_addend]
    if not wants_queries:
        return grads
    return [*grads, grad_queries[0] if len(grad_queries) == 1 else torch.cat(grad_queries)]


def phase1(
    sources: Sequence[Tensor], logits: Sequence[Tensor], dim: int
) -> tuple[list[Tensor], Tensor, Tensor]:
    """``plain_phases.phase1``."""
    sources, logits = contiguous(sources), contiguous(logits)
    check_device(sources[0])
    layout = Layout(sources[0], dim)
    sites = len(logits[0])
    weights, statistics = _softmax(logits, layout)
    mixes = [layout.source() for _ in range(sites)]
    for group in groups(sites, specialise.MAX_SITES["phase1_forward"]):
        kernel = specialise.phase1_forward(
            sources=len(sources),
            sites=sites,
            first_site=group.start,
            group=len(group),
            width=layout.width,
            dtype=sources[0].dtype,
            images=layout.images,
        )
        arguments = named("source", sources) | {"weights": weights, **layout.sizes()}
        arguments |= {f"mix{j}": mixes[j] for j in group}
        launch.launch(kernel, (layout.chunks(kernel), kernel.tiles), arguments)
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
    """``plain_phases.phase1_backward``."""
    sources, weights = contiguous(sources), weights.contiguous()
    check_device(sources[0])
    layout = Layout(sources[0], dim)
    count, all_sites = len(sources), weights.shape[1]
    by_site = dict(zip(sites, contiguous(grad_mixes), strict=True))
    incoming = dict(zip(arrived, contiguous(grad_carriers), strict=True))
    results = {i: layout.source() for i in wanted}
    tiles = -(-layout.width // specialise.streaming_tile(layout.width))
    slopes_of = specialise.sources_with_slopes(count, sources[0].dtype)
    grad_logits = layout.statistics(count, all_sites)
    if tiles == 1 and slopes_of < count:  # what the tile finds are gradients of logits
        slopes = grad_logits[:slopes_of]
    else:
        slopes = layout.statistics(tiles, slopes_of, all_sites)
    if len(sites) < all_sites:  # what no kernel writes
        slopes.zero_()
    given: dict[str, Argument | None] = {
        **named("source", sources),
        "weights": weights,
        "slopes": slopes,
        "grad_statistics": grad_statistics.contiguous(),
        "grad_logits": grad_logits,
        **{f"grad_mix{j}": grad for j, grad in by_site.items()},
        **{f"grad_source{i}": grad for i, grad in results.items()},
        **layout.sizes(),
    }
    for group in groups(len(sites), specialise.MAX_SITES["phase1_backward"]) or [range(0)]:
        present = [sites[j] for j in group]
        kernel = specialise.phase1_backward(
            sources=count,
            sites=all_sites,
            present=present,
            arrived=sorted(incoming),
            wanted=wanted,
            wants_slopes=wants_logits,
            width=layout.width,
            dtype=sources[0].dtype,
            images=layout.images,
        )
        given |= {f"grad_carrier{i}": grad for i, grad in incoming.items()}
        launch.launch(kernel, (layout.chunks(kernel), kernel.tiles), accepted(kernel, given))
        incoming = results  # further groups of sites add to what the first has stored
    grads = [results[i] for i in wanted]
    if not wants_logits:
        return grads
    kernel = specialise.phase1_logits(
        sources=count, sites=all_sites, tiles=tiles, dtype=sources[0].dtype
    )
    launch.launch(kernel, (layout.chunks(kernel), all_sites), accepted(kernel, given))
    return [*grads, grad_logits]


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
    """``plain_phases.phase2``."""
    check_device(query)
    sources, addends = contiguous(sources), contiguous(addends[:2])
    before = None if before is None else before.contiguous()
    layout = Layout(before if before is not None else [*sources, *addends][0], dim)
    like = layout.like
    wants_mix = wants_mix or norm == "none"
    kernel = specialise.phase2_forward(
        before=before is not None,
        sources=len(sources),
        addends=len(addends),
        norm=norm,
        weight=None if norm_weight is None else norm_weight.dtype,
        bias=None if norm_bias is None else norm_bias.dtype,
        normed=norm_dtype,
        wants_mix=wants_mix,
        width=layout.width,
        dtype=like.dtype,
        images=layout.images,
        eps=eps,
        norm_eps=norm_eps,
    )
    rows = 2 * (len(sources) + bool(addends)) + NORM_ROWS[norm]
    partial = layout.source() if len(addends) == 2 else launch.allocate(like, 0)
    mixed = layout.source() if wants_mix else launch.allocate(like, 0)
    normed = (
        launch.allocate(like, 0, dtype=norm_dtype) if norm == "none" else layout.source(norm_dtype)
    )
    saved = layout.statistics(rows)
    programs, run = runs(layout.tokens, 1, like, per_processor=8)
    given: dict[str, Argument | None] = {
        "before": before,
        "statistics": None if statistics is None else statistics.contiguous(),
        **named("source", sources),
        **named("addend", addends),
        "query": query.contiguous(),
        "saved": saved,
        "norm_weight": None if norm_weight is None else norm_weight.contiguous(),
        "norm_bias": None if norm_bias is None else norm_bias.contiguous(),
        "partial": partial,
        "mixed": mixed,
        "normed": normed,
        "count": float(count),
        "run": run,
        **layout.sizes(),
    }
    launch.launch(kernel, (programs,), accepted(kernel, given))
    return partial if len(addends) != 1 else stand_in(addends[0]), mixed, normed, saved


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
    """``plain_phases.phase2_backward``."""
    check_device(query)
    sources = contiguous(sources)
    partial = None if partial is None else partial.contiguous()
    direct = sources if partial is None else [*sources, partial]
    before = None if before is None else before.contiguous()
    layout = Layout(before if before is not None else direct[0], dim)
    like = layout.like
    wants = {"query": wants_query, "weight": wants_weight, "bias": wants_bias}
    vectors = [name for name, needed in wants.items() if needed]
    adds_partial = grad_partial is not None and len(sources) in wanted and partial is not None
    kernel = specialise.phase2_backward(
        before=before is not None,
        sources=len(sources),
        has_partial=partial is not None,
        norm=norm,
        weight=None if norm_weight is None else norm_weight.dtype,
        normed=None if grad_normed is None else grad_normed.dtype,
        has_mixed=grad_mixed is not None,
        has_grad_partial=adds_partial,
        wants_before=wants_before,
        wanted=wanted,
        vectors=vectors,
        width=layout.width,
        dtype=like.dtype,
        images=layout.images,
    )
    programs, run = runs(layout.tokens, 32, like, per_processor=1)
    grad_before = layout.source() if wants_before else None
    grad_statistics = layout.statistics(2) if wants_before else None
    results = {k: layout.source() for k in wanted}
    partials = launch.allocate(query, len(vectors), programs, layout.width)
    given: dict[str, Argument | None] = {
        "grad_normed": None if grad_normed is None else grad_normed.contiguous(),
        "grad_mixed": None if grad_mixed is None else grad_mixed.contiguous(),
        "grad_partial": None if grad_partial is None else grad_partial.contiguous(),
        "before": before,
        "statistics": None if statistics is None else statistics.contiguous(),
        **named("source", sources),
        "partial": partial,
        "query": query.contiguous(),
        "norm_weight": None if norm_weight is None else norm_weight.contiguous(),
        "saved": saved.contiguous(),
        "grad_before": grad_before,
        "grad_statistics": grad_statistics,
        **{f"grad_source{k}": grad for k, grad in results.items()},
        "grad_vectors": partials,
        "count": float(count),
        "run": run,
        **layout.sizes(),
    }
    launch.launch(kernel, (programs,), accepted(kernel, given))
    grads = [grad for grad in (grad_before, grad_statistics) if grad is not None]
    grads += [results[k] for k in wanted]
    return grads + [_sum_over_programs(partial) for partial in partials]


def _softmax(logits: Sequence[Tensor], layout: Layout) -> tuple[Tensor, Tensor]:
    """The weights a_ij, [n, S, *tokens], and the statistics, [S, 2, *tokens]."""
    sites = len(logits[0])
    weights, statistics = layout.statistics(len(logits), sites), layout.statistics(sites, 2)
    kernel = specialise.phase1_weights(sources=len(logits), sites=sites, dtype=layout.like.dtype)
    arguments = named("logits", logits) | {"weights": weights, "statistics": statistics}
    arguments["tokens"] = layout.tokens
    launch.launch(kernel, (layout.chunks(kernel), sites), arguments)
    return weights, statistics


def _sum_over_programs(partials: Tensor) -> Tensor:
    """The sum over the first dimension, in its order."""
    programs, *shape = partials.shape
    result = launch.allocate(partials, *shape)
    size = result.numel()
    kernel = specialise.sum_partials(dtype=partials.dtype)
    arguments: dict[str, Argument] = {"partials": partials, "result": result}
    launch.launch(
        kernel,
        (-(-size // specialise.SUM_TILE),),
        {**arguments, "programs": programs, "size": size},
    )
    return result
