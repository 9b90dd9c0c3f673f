"""Where a graph records gradients and where it does not: under ``torch.no_grad`` and its kin.

A node that moves from one such place to another, or takes over what is computed at another, would
give gradients to what the model keeps them from, or lose them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

_ENTERS = torch.autograd.grad_mode._enter_inference_mode
_LEAVES = torch.autograd.grad_mode._exit_inference_mode


def gradient_modes(nodes: Iterable[fx.Node], *, at_start: bool) -> dict[fx.Node, bool]:
    """Whether gradients are recorded at each of the nodes, given in the order of their graph.

    Args:
        nodes: those of a torch-level graph.
        at_start: whether they are recorded where the graph is called.
    """
    modes: dict[fx.Node, bool] = {}
    enabled, inferences = at_start, 0
    for node in nodes:
        if node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
        inferences += (node.target is _ENTERS) - (node.target is _LEAVES)
        modes[node] = enabled and not inferences
    return modes
