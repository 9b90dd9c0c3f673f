"""Put activation-checkpointed regions back, for an executor that runs the graph node by node.

`inline_checkpoints` opened the regions and the rewrite put mixes into them; here every region
becomes a submodule that `torch.utils.checkpoint` runs, so that the bytes saved for the backward
pass fall as the user asked. (For Inductor the regions are expressed as recompute tags instead.)

Contract: same values, same order of execution; a graph without regions is returned as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.split_module import split_module
from torch.utils.checkpoint import checkpoint

from attnres_compile.passes.inline_checkpoints import REGION, Region


def outline_checkpoints(module: fx.GraphModule) -> fx.GraphModule:
    """Groups the nodes of each region into a checkpointed submodule."""
    parts, regions = _partition(module.graph)
    if not regions:
        return module
    split = split_module(module, module, lambda node: parts[node], keep_original_order=True)
    for part, region in regions.items():
        name = f"submod_{part}"
        setattr(split, name, _Checkpointed(split.get_submodule(name), region))
    return split


class _Checkpointed(nn.Module):
    """A part of a graph whose activations are recomputed in the backward pass."""

    def __init__(self, body: nn.Module, region: Region) -> None:
        super().__init__()
        self.body = body
        options = dict(region.options)
        options["use_reentrant"] = False  # the reentrant form takes no nested outputs
        self._options = options

    def forward(self, *args: Any) -> Any:
        return checkpoint(self.body, *args, **self._options)


def _partition(graph: fx.Graph) -> tuple[dict[fx.Node, int], dict[int, Region]]:
    """Runs of consecutive nodes with one region, or none, numbered in graph order."""
    parts: dict[fx.Node, int] = {}
    regions: dict[int, Region] = {}
    current: Region | None = None
    number = 0
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        region = node.meta.get(REGION)
        if region is not current:
            number += 1
            current = region
        parts[node] = number
        if region is not None:
            regions[number] = region
    return parts, regions


def recompute_tags(graph: fx.Graph) -> None:
    """Marks the nodes of each region for recomputation by AOTAutograd's partitioner."""
    for node in graph.nodes:
        region = node.meta.get(REGION)
        if region is not None:
            node.meta["recompute"] = torch.utils.checkpoint.CheckpointPolicy.PREFER_RECOMPUTE
            node.meta["ac_graph_id"] = region.index
