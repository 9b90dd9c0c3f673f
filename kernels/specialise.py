"""Which kernels there are: one function per template, from what a launch knows to a specialisation.

Here are also the choices of tile, warps and block, made for 16-byte accesses: a thread holds eight
neighbouring channels of a tile, in 16 bits one access and in 32 bits two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attnres_compile.errors import BackendError
from attnres_compile.kernels.codegen import Kind, Parameter, Specialisation
from attnres_compile.kernels.implementations import NORM_ROWS
from attnres_compile.kernels.reference import arithmetic_dtype

# Sites that one pass over the sources serves, and logits that one pass over a source yields. The
# launcher makes several passes for more.
MAX_SITES = {"phase1_forward": 12, "phase1_backward": 16, "complete": 64}
# Numbers that a program of sum_partials sums.
SUM_TILE = 256
# Tiles of rows that stay in registers through the backward pass of phase 2: the members of the
# mix, its gradient and the sums over tokens. With more, the members are read a second time.
MAX_HELD = 20
_CHANNELS_PER_WARP = 256
# In bfloat16 with as many completed sources or fewer, phase 1 does not read the newest one for the
# gradients of its logits; with more, that would cost more digits and spare less of the traffic.
MAX_DERIVED = 8
_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}


class _Signature:
    """Collects the parameters of a kernel in order."""

    def __init__(self, stream: torch.dtype, *, images: bool) -> None:
        if stream not in _POINTERS:
            raise BackendError(
                f"there are no Triton kernels for sources of {stream}; use float32, bfloat16, "
                "float16 or float64, or kernels='reference'."
            )
        self.stream, self.images = stream, images
        self.fp = arithmetic_dtype(stream)
        self.parameters: list[Parameter] = []

    def add(self, kind: Kind, *names: str, dtype: torch.dtype | None = None) -> None:
        default = self.stream if kind == "row" else self.fp
        spelled = "i32" if kind == "number" else _POINTERS[dtype or default]
        self.parameters += [Parameter(name, spelled, kind) for name in names]

    def finish(
        self, template: str, constants: dict[str, Any], *sizes: str, **options: int
    ) -> Specialisation:
        self.add("number", *sizes, *(["inner"] if self.images else []))
        constants |= {"images": self.images, "fp": spell(self.fp), "stream": spell(self.stream)}
        frozen = tuple(sorted(constants.items()))
        return Specialisation(template, frozen, tuple(self.parameters), **options)


def complete_forward(
    *, addends: int, sites: int, width: int, dtype: torch.dtype, images: bool, eps: float
) -> Specialisation:
    """``templates/complete_forward.py.jinja``."""
    signature = _Signature(dtype, images=images)
    signature.add("row", *_numbered("addend", range(addends)))
    if addends == 2:
        signature.add("row", "source")
    signature.add("vector", "queries")
    signature.add("statistic", "logits", "inverse_rms")
    padded = max(16, _power_of_two(sites))
    tile = min(64 if padded > 16 else 128, max(16, _power_of_two(width)))
    constants: dict[str, Any] = {"addends": addends, "sites": sites, "padded_sites": padded}
    constants |= {"width": width, "tile": tile, "eps": eps}
    warps = 8 if padded > 32 else 4
    return signature.finish(
        "complete_forward", constants, "tokens", block=32, warps=warps, stages=2
    )


def complete_backward(
    *,
    sites: int,
    width: int,
    dtype: torch.dtype,
    images: bool,
    has_grad_source: bool,
    wants_source: bool,
    wants_queries: bool,
) -> Specialisation:
    """``templates/complete_backward.py.jinja``."""
    signature = _Signature(dtype, images=images)
    if wants_source and has_grad_source:
        signature.add("row", "grad_source")
    signature.add("row", "source")
    if wants_source:
        signature.add("vector", "queries")
    signature.add("statistic", "grad_logits")
    if wants_source:
        signature.add("statistic", "logits")
    signature.add("statistic", "inverse_rms")
    if wants_source:
        signature.add("row", "grad_addend")
    if wants_queries:
        signature.add("vector", "grad_queries")
    padded = max(16, _power_of_two(sites))
    tile = min(4096 // padded, max(16, _power_of_two(width)))
    constants = {"sites": sites, "padded_sites": padded, "width": width, "tile": tile}
    constants |= {"has_grad_source": has_grad_source, "wants_source": wants_source}
    constants |= {"wants_queries": wants_queries}
    warps = 4 if padded > 32 else 8
    return signature.finish("complete_backward", constants, "tokens", "run", block=16, warps=warps)


def phase1_weights(*, sources: int, sites: int, dtype: torch.dtype) -> Specialisation:
    """``templates/phase1_weights.py.jinja``."""
    signature = _Signature(dtype, images=False)
    signature.add("statistic", *_numbered("logits", range(sources)), "weights", "statistics")
    constants = {"sources": sources, "sites": sites}
    return signature.finish("phase1_weights", constants, "tokens", block=128)


def phase1_forward(
    *,
    sources: int,
    sites: int,
    first_site: int,
    group: int,
    width: int,
    dtype: torch.dtype,
    images: bool,
) -> Specialisation:
    """``templates/phase1_forward.py.jinja``, for the ``group`` sites from ``first_site`` on."""
    signature = _Signature(dtype, images=images)
    signature.add("row", *_numbered("source", range(sources)))
    signature.add("statistic", "weights")
    signature.add("row", *_numbered("mix", range(first_site, first_site + group)))
    tile = streaming_tile(width)
    constants = {"sources": sources, "sites": sites, "first_site": first_site, "group": group}
    constants |= {"width": width, "tile": tile}
    return signature.finish("phase1_forward", constants, "tokens", **_shape(tile))


def phase1_backward(
    *,
    sources: int,
    sites: int,
    present: Sequence[int],
    arrived: Sequence[int],
    wanted: Sequence[int],
    wants_slopes: bool,
    width: int,
    dtype: torch.dtype,
    images: bool,
) -> Specialisation:
    """``templates/phase1_backward.py.jinja``, for the sites ``present``."""
    signature = _Signature(dtype, images=images)
    slopes_of = sources_with_slopes(sources, dtype) if wants_slopes else 0
    signature.add("row", *_numbered("grad_mix", present))
    signature.add("statistic", "weights")
    signature.add("row", *_numbered("source", range(slopes_of)))
    if slopes_of:
        signature.add("statistic", "slopes")
    if 0 < slopes_of < sources:
        signature.add("statistic", "grad_statistics")
    signature.add("row", *_numbered("grad_carrier", arrived), *_numbered("grad_source", wanted))
    tile = streaming_tile(width)
    constants: dict[str, Any] = {"sources": sources, "sites": sites, "width": width}
    constants["slopes_of"] = slopes_of
    constants |= {"present": tuple(present), "arrived": tuple(arrived), "wanted": tuple(wanted)}
    constants |= {"tile": tile}
    registers = 128 if len(present) <= 8 else 0
    return signature.finish(
        "phase1_backward", constants, "tokens", registers=registers, **_shape(tile)
    )


def phase1_logits(*, sources: int, sites: int, tiles: int, dtype: torch.dtype) -> Specialisation:
    """``templates/phase1_logits.py.jinja``."""
    signature = _Signature(dtype, images=False)
    slopes_of = sources_with_slopes(sources, dtype)
    if slopes_of:
        signature.add("statistic", "slopes")
    if slopes_of == sources:
        signature.add("statistic", "weights")
    signature.add("statistic", "grad_statistics", "grad_logits")
    constants = {"sources": sources, "slopes_of": slopes_of, "sites": sites, "tiles": tiles}
    return signature.finish("phase1_logits", constants, "tokens", block=128)


def phase2_forward(
    *,
    before: bool,
    sources: int,
    addends: int,
    norm: str,
    weight: torch.dtype | None,
    bias: torch.dtype | None,
    normed: torch.dtype,
    wants_mix: bool,
    width: int,
    dtype: torch.dtype,
    images: bool,
    eps: float,
    norm_eps: float,
) -> Specialisation:
    """``templates/phase2_forward.py.jinja``."""
    signature = _Signature(dtype, images=images)
    if before:
        signature.add("row", "before")
        signature.add("statistic", "statistics")
    signature.add("row", *_numbered("source", range(sources)))
    signature.add("row", *_numbered("addend", range(addends)))
    if sources or addends:
        signature.add("vector", "query")
        signature.add("statistic", "saved")
    elif norm != "none":
        signature.add("statistic", "saved")
    if weight is not None:
        signature.add("vector", "norm_weight", dtype=weight)
    if bias is not None:
        signature.add("vector", "norm_bias", dtype=bias)
    if addends == 2:
        signature.add("row", "partial")
    if wants_mix:
        signature.add("row", "mixed")
    if norm != "none":
        signature.add("row", "normed", dtype=normed)
    signature.parameters.append(Parameter("count", "fp32", "number"))
    tile = whole_row_tile(width, 4)
    constants = {"before": before, "sources": sources, "addends": addends, "norm": norm}
    constants |= {"weight": weight is not None, "bias": bias is not None, "eps": eps}
    constants |= {"norm_eps": norm_eps, "norm_rows": NORM_ROWS[norm], "wants_mix": wants_mix}
    constants |= {"normed_type": spell(normed), "width": width, "tile": tile}
    constants |= {"tiles": -(-width // tile)}
    return signature.finish("phase2_forward", constants, "tokens", "run", **_shape(tile))


def phase2_backward(
    *,
    before: bool,
    sources: int,
    has_partial: bool,
    norm: str,
    weight: torch.dtype | None,
    normed: torch.dtype | None,
    has_mixed: bool,
    has_grad_partial: bool,
    wants_before: bool,
    wanted: Sequence[int],
    vectors: Sequence[str],
    width: int,
    dtype: torch.dtype,
    images: bool,
) -> Specialisation:
    """``templates/phase2_backward.py.jinja``; ``vectors`` are among query, weight and bias."""
    signature = _Signature(dtype, images=images)
    values = sources + has_partial
    if normed is not None:
        signature.add("row", "grad_normed", dtype=normed)
    if has_mixed:
        signature.add("row", "grad_mixed")
    if has_grad_partial:
        signature.add("row", "grad_partial")
    if before:
        signature.add("row", "before")
        signature.add("statistic", "statistics")
    signature.add("row", *_numbered("source", range(sources)))
    if has_partial:
        signature.add("row", "partial")
    if values + before > 1:
        signature.add("vector", "query")
    if weight is not None and normed is not None:
        signature.add("vector", "norm_weight", dtype=weight)
    signature.add("statistic", "saved")
    if wants_before:
        signature.add("row", "grad_before")
        signature.add("statistic", "grad_statistics")
    signature.add("row", *_numbered("grad_source", wanted))
    if vectors:
        signature.add("vector", "grad_vectors")
    signature.parameters.append(Parameter("count", "fp32", "number"))
    tile = whole_row_tile(width, 2 if width <= 4096 else 4)
    constants = {"before": before, "sources": sources, "has_partial": has_partial, "norm": norm}
    constants |= {"weight": weight is not None, "has_normed": normed is not None}
    constants |= {"has_mixed": has_mixed, "has_grad_partial": has_grad_partial}
    constants |= {"wants_before": wants_before, "wanted": tuple(wanted), "vectors": tuple(vectors)}
    rows = values + before + 1 + len(vectors)
    held = rows * -(-width // tile) <= MAX_HELD
    constants |= {"hold": held, "norm_rows": NORM_ROWS[norm]}
    constants |= {"width": width, "tile": tile, "tiles": -(-width // tile)}
    registers = 128 if rows - len(vectors) == 2 and width <= 4096 else 0  # a single member
    return signature.finish(
        "phase2_backward", constants, "tokens", "run", registers=registers, **_shape(tile)
    )


def sum_partials(*, dtype: torch.dtype) -> Specialisation:
    """``templates/sum_partials.py.jinja``."""
    signature = _Signature(dtype, images=False)
    signature.add("vector", "partials", "result")
    return signature.finish("sum_partials", {"tile": SUM_TILE}, "programs", "size", warps=2)


def sources_with_slopes(sources: int, dtype: torch.dtype) -> int:
    """Of how many sources phase 1 forms the slopes that the gradients of logits come from.

    Of all but the newest where that is derived, which is a row less to read; ``phase1.py`` says
    what it costs.
    """
    derived = dtype == torch.bfloat16 and sources <= MAX_DERIVED
    return sources - 1 if sources == 1 or derived else sources


def streaming_tile(width: int) -> int:
    """Of a kernel whose programs have one tile of the row each: the one that wastes least.

    At least a warp's worth, and of equally good ones the widest.
    """
    sizes = [size for size in (1024, 512, 256) if size <= _power_of_two(width)]
    if not sizes:
        return max(16, _power_of_two(width))
    return min(sizes, key=lambda size: (-(-width // size) * size > 1.125 * width, -size))


def whole_row_tile(width: int, most: int) -> int:
    """Of a kernel whose programs have whole rows: such that there are at most ``most`` tiles.

    A row then takes ``8 * most`` registers of a thread.
    """
    part = _power_of_two(-(-width // most))
    return min(max(part, 2 * _CHANNELS_PER_WARP), max(16, _power_of_two(width)))


def spell(dtype: torch.dtype) -> str:
    """``dtype`` as it is written inside a kernel."""
    return f"tl.{str(dtype).removeprefix('torch.')}"


def _shape(tile: int) -> dict[str, int]:
    """Warps for the tile; of narrow rows a warp takes several."""
    return {
        "warps": max(1, tile // _CHANNELS_PER_WARP),
        "block": max(1, _CHANNELS_PER_WARP // tile),
    }


def _numbered(name: str, numbers: Sequence[int] | range) -> list[str]:
    return [f"{name}{number}" for number in numbers]


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
