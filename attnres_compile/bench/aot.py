"""What every kernel of a block compiles to, for each target, without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from attnres_compile.bench.machine import machine
from attnres_compile.errors import InputError
from attnres_compile.kernels import aot
from attnres_compile.kernels.codegen import Specialisation


def kernels_of_a_block(
    width: int, sources: int, sites: int, dtype: str
) -> dict[str, Specialisation]:
    """By name; those that are compiled when none are named."""
    if width < 1 or sources < 1 or sites < 1:
        raise InputError("width, sources and sites must be positive.")
    return aot.kernels_of_a_block(
        sources=sources, sites=sites, width=width, dtype=getattr(torch, dtype)
    )


def measure(
    *,
    width: int,
    sources: int,
    sites: int,
    dtype: str,
    targets: Sequence[str] = aot.TARGETS,
    kernels: Sequence[str] = (),
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Registers, spills, shared memory and accesses of each kernel; of all without `kernels`."""
    of_block = kernels_of_a_block(width, sources, sites, dtype)
    unknown = sorted(set(kernels) - set(of_block))
    if unknown:
        raise InputError(f"no kernel is called {unknown[0]!r}; there are: {', '.join(of_block)}.")
    found = []
    for name in kernels or of_block:
        for target in targets:
            found.append(asdict(aot.compile_for(of_block[name], target, name)))
            tick()
    return {
        "width": width,
        "sources": sources,
        "sites": sites,
        "dtype": dtype,
        "spills": sum(each["spills"] for each in found),
        "kernels": found,
        "machine": machine(),
    }
