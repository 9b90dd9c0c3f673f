"""Where a graph records gradients and where it does not: under ``torch.no_grad`` and its kin.

A node that moves from one such place to another, or takes over what is computed at another, would
give gradients to what the model keeps them from, or lose them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx


@dataclass(frozen=True)
class GradientMode:
    """Whether gradients are recorded, and whether under ``torch.inference_mode``."""

    records: bool
    infers: bool = False


def gradient_modes(nodes: Iterable[fx.Node], *, at_start: bool) -> dict[fx.Node, GradientMode]:
    """The mode in which each of the nodes is computed, given in the order of their graph.

    Args:
        nodes: those of a torch-level graph.
        at_start: whether gradients are recorded where the graph is called.
    """
    modes: dict[fx.Node, GradientMode] = {}
    mode, outside = GradientMode(at_start), list[GradientMode]()
    for node in nodes:
        modes[node] = mode
        if node.target is torch._C._set_grad_enabled:
            mode = GradientMode(bool(node.args[0]), mode.infers)
        elif node.target is torch.autograd.grad_mode._enter_inference_mode:
            outside.append(mode)
            mode = GradientMode(not node.args[0], bool(node.args[0]))
        elif node.target is torch.autograd.grad_mode._exit_inference_mode:
            mode = outside.pop()
    return modes
