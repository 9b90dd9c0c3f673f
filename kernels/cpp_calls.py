"""The C++ phases as a compiled graph calls them: operators that are called in half the time.

The operators of ``phases.py`` pass through autograd and through checks of ``custom_op`` on every
call, in Python. In the graphs that Inductor gets, all derivatives have been taken, so there the
calls with ``kernels="cpp"`` are replaced by operators of the same arguments that do nothing but run
the C++ library: ``attnres::cpp_complete`` and the like. ``decompositions`` is the table for that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attnres_compile.kernels import cpp_phases, phases
from attnres_compile.kernels.plain_phases import stand_in

NAMES = (
    "complete",
    "complete_backward",
    "phase1",
    "phase1_backward",
    "phase2",
    "phase2_backward",
)


def decompositions() -> dict[torch._ops.OpOverload[..., Any], Callable[..., Any]]:
    """What stands for the operators of the phases in a graph that runs all of them in C++."""
    _register()
    operators = torch.ops.attnres
    return {getattr(operators, name).default: _replacement(name) for name in NAMES}


def _replacement(name: str) -> Callable[..., Any]:
    operator = getattr(torch.ops.attnres, f"cpp_{name}").default

    def call(*arguments: Any) -> Any:
        *given, kernels = arguments
        assert kernels == "cpp", kernels
        return operator(*given)

    return call


@cache
def _register() -> object:
    """Defines the operators once; they live as long as what is returned."""
    assert phases.complete is not None  # has registered the operators whose schemas these have
    library: Any = torch.library.Library("attnres", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in NAMES:
        schema = str(getattr(torch.ops.attnres, name).default._schema)
        schema = schema.replace(f"attnres::{name}", f"cpp_{name}").replace(", str kernels", "")
        library.define(schema)
        library.impl(f"cpp_{name}", _implementation(name), "CPU")
        torch.library.register_fake(f"attnres::cpp_{name}", _shapes(name), lib=library)
    return library


def _implementation(name: str) -> Callable[..., Any]:
    if name == "phase1":
        return _phase1
    return lambda *arguments: getattr(cpp_phases, name)(*arguments)


def _phase1(
    sources: Sequence[Tensor], carriers: Sequence[Tensor], logits: Sequence[Tensor], dim: int
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    mixes, statistics = cpp_phases.phase1(sources, logits, dim)
    return mixes, statistics, [stand_in(source) for source in sources]


def _shapes(name: str) -> Callable[..., Any]:
    """Those of the operator that it stands for."""
    operator = getattr(torch.ops.attnres, name).default
    return lambda *arguments: operator(*arguments, "cpp")
