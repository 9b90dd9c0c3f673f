"""Lower mixes to kernels, or leave them to plain PyTorch, by device, dtype and the user's choice.

========== ============================== ==================================================
kernels    where                          what computes the mixes
========== ============================== ==================================================
auto       CUDA and ROCm                  generated Triton kernels, scheduled and fused
auto       CPU, channels last, float32,   C++, scheduled and fused: one small library compiled
           float64 or bfloat16            once, which costs no compile time per site
auto       anything else                  ``attnres::mix`` as it is: plain PyTorch
triton     CUDA, ROCm; a CPU interprets   generated Triton kernels, scheduled and fused
reference  everywhere                     ``attnres::mix``, told to stay in plain PyTorch
========== ============================== ==================================================

A CPU finds sources again in its caches, so two phases pay from one source later on. Measured on a
block of 6 sites of 2048 x 128 float32 rows, two phases take of the time of one pass: with 3 sources
1.13 in inference and 1.23 backward, with 4 sources 0.98 and 1.07, with 8 sources 0.84 and 0.75.
Phases in C++ stay operators until Inductor has a graph; ``inline_cpp_phases.py`` goes on.

Contract: values are the same to rounding. What is left to plain PyTorch is not changed at all.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import fx

from attnres_compile.kernels import cpp_library
from attnres_compile.passes.fuse_neighbours import fuse_neighbours
from attnres_compile.passes.graph_values import value_of
from attnres_compile.passes.keep_layouts import PHASES, keep_layouts
from attnres_compile.passes.schedule_two_phase import Mix, schedule_two_phase

Kernels = Literal["auto", "triton", "reference"]
Implementation = Literal["triton", "cpp", "mix"]
_FEWEST_SOURCES_ON_CPU = 4


def lower(graph: fx.Graph, kernels: Kernels) -> None:
    """Schedules, fuses and lowers the mixes of a graph, in place.

    Args:
        graph: torch-level or ATen, with example values, after the residual streams were rewritten.
        kernels: who is to compute the mixes.

    Raises:
        BackendError: kernels="triton" for tensors on a CPU outside of Triton's interpreter, or a
            C++ library that cannot be compiled.
    """
    if kernels == "reference":
        _leave_to_pytorch(graph)
        return
    schedule_two_phase(
        graph,
        admits=lambda mix: implementation(mix, kernels) != "mix",
        in_two_phases=lambda block: (
            block.moves_less_in_two_phases
            and (
                implementation(block.mixes[0], kernels) == "triton"
                or len(block.completed) >= _FEWEST_SOURCES_ON_CPU
            )
        ),
    )
    fuse_neighbours(graph)
    keep_layouts(graph)
    for node in graph.nodes:
        if node.target in PHASES:
            _assign(node, kernels)


def implementation(mix: Mix, kernels: Kernels) -> Implementation:
    """Who computes a mix: the table above."""
    source = value_of(mix.sources[0])
    device = source.device.type
    if kernels == "triton" or device == "cuda":
        return "triton"
    if device == "cpu" and mix.dim == -1 and source.dtype in cpp_library.DTYPES:
        return "cpp"
    return "mix"


def _leave_to_pytorch(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.target in (torch.ops.attnres.mix, torch.ops.attnres.mix.default):
            node.update_kwarg("kernels", "reference")


def _assign(node: fx.Node, kernels: Kernels) -> None:
    """Names the implementation in the last argument of a phase."""
    source = value_of(node.all_input_nodes[0])
    on_gpu = kernels == "triton" or source.device.type == "cuda"
    if on_gpu:
        from attnres_compile.kernels.launch import check_device

        check_device(source)
    else:
        cpp_library.prepare(source.dtype)
    name = "triton" if on_gpu else "cpp"
    if "kernels" in node.kwargs:
        node.update_kwarg("kernels", name)
    else:
        node.update_arg(len(node.args) - 1, name)
