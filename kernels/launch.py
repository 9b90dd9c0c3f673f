"""Launching generated kernels: compile once per specialisation, pass arguments by name.

On a CPU, kernels run in Triton's interpreter, for which TRITON_INTERPRET=1 has to be in the
environment before Triton is imported. The interpreter's cost is per operation and not per element,
so it gets larger blocks of tokens; nothing else differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attnres_compile.errors import BackendError
from attnres_compile.kernels import cache as source_cache
from attnres_compile.kernels import codegen
from attnres_compile.kernels.codegen import Specialisation

Argument = Tensor | int | float

# Called before every launch; traffic.py finds out here which memory is which.
observers: list[Callable[[Specialisation, Mapping[str, Argument]], None]] = []

_INTERPRETED_BLOCK = 256
# Of 512 tokens or more, as on a GPU that has tens of thousands to work on.
_INTERPRETED_RUN, _INTERPRETED_PROGRAMS = 512, 16


def allocate(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a result, on the device of ``like``; every kernel's output comes from here."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def launch(
    specialisation: Specialisation, grid: tuple[int, ...], arguments: Mapping[str, Argument]
) -> None:
    """Run a kernel on ``grid``; the first tensor argument says where."""
    if 0 in grid:
        return
    tensor = next(value for value in arguments.values() if isinstance(value, Tensor))
    for observer in observers:
        observer(specialisation, arguments)
    with _device(tensor):
        kernel(specialisation)[grid](
            **arguments,
            TOK=block(specialisation, tensor, int(arguments.get("tokens", 1))),
            **options(specialisation, nvidia=torch.version.hip is None),
        )


@cache
def kernel(specialisation: Specialisation) -> Any:
    """The kernel as Triton has it: compiled at its first launch, or interpreted."""
    text = codegen.render(specialisation)
    return source_cache.load(specialisation.template, text).kernel


def block(specialisation: Specialisation, tensor: Tensor, tokens: int) -> int:
    """How many of ``tokens`` a program works on at a time."""
    if tensor.device.type != "cpu":
        return specialisation.block
    return max(specialisation.block, min(_INTERPRETED_BLOCK, 1 << max(tokens - 1, 0).bit_length()))


def options(specialisation: Specialisation, *, nvidia: bool) -> dict[str, int]:
    """How the compiler is to lay a kernel out. A warp of AMD's has 64 threads."""
    threads = 32 * specialisation.warps
    chosen = {"num_warps": max(1, threads // (32 if nvidia else 64))}
    chosen["num_stages"] = specialisation.stages
    if nvidia and specialisation.registers:
        chosen["maxnreg"] = specialisation.registers
    return chosen


def runs(tokens: int, shortest: int, tensor: Tensor, *, per_processor: int) -> tuple[int, int]:
    """How many programs share ``tokens``, and how many consecutive ones each gets.

    At least ``shortest`` tokens each, and at most ``per_processor`` programs for each processor,
    so that little of what the programs leave behind has to be added up.
    """
    if tensor.device.type == "cpu":
        most, shortest = _INTERPRETED_PROGRAMS, max(shortest, _INTERPRETED_RUN)
    else:
        most = per_processor * _processors(tensor.device)
    run = max(shortest, -(-tokens // most))
    run = -(-run // shortest) * shortest
    return -(-tokens // run), run


def check_device(tensor: Tensor) -> None:
    """Raise BackendError unless kernels can run where ``tensor`` is."""
    if tensor.device.type == "cuda" or interpreted():
        return
    raise BackendError(
        f"kernels='triton' cannot run on {tensor.device.type} tensors; move them to a GPU, use "
        "kernels='reference', or set TRITON_INTERPRET=1 before Triton is imported to interpret "
        "the kernels."
    )


def interpreted() -> bool:
    """Whether Triton interprets kernels in this process: its own functions say so."""
    try:
        from triton.language import standard
        from triton.runtime.interpreter import InterpretedFunction
    except ImportError as error:
        raise BackendError("kernels='triton' needs Triton; pip install triton.") from error
    return isinstance(standard.sum, InterpretedFunction)


@cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _device(tensor: Tensor) -> Any:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()
