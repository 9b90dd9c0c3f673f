"""Inline the bodies of activation-checkpointed regions, remembering which nodes they held.

Dynamo puts a checkpointed layer into a subgraph behind one `tag_activation_checkpoint` node, where
its residual additions cannot be seen. This pass copies each body into the graph around it. Every
copied node carries its region in ``node.meta[REGION]``, so that `outline_checkpoints` can restore
the regions after the rewrite.

Contract: the graph computes the same values; nothing but checkpoint nodes is removed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnres_compile.passes.graph_bodies import body_of, copy_body, erase_call, replace_results

REGION = "attnres_checkpoint_region"


@dataclass(frozen=True)
class Region:
    """One activation-checkpointed region, with the options of the user's `checkpoint` call."""

    index: int
    options: tuple[tuple[str, Any], ...]


def inline_checkpoints(module: fx.GraphModule) -> int:
    """Inlines every checkpointed region of a graph module, in place; returns how many."""
    calls = [node for node in module.graph.nodes if _is_checkpoint(node)]
    known = {node.meta[REGION].index for node in module.graph.nodes if REGION in node.meta}
    for index, node in enumerate(calls, start=1 + max(known, default=-1)):
        _inline(module, node, Region(index, _options(node)))
    if calls:
        module.graph.lint()
        module.recompile()
    return len(calls)


def _is_checkpoint(node: fx.Node) -> bool:
    return (
        node.op == "call_function"
        and node.target is torch.ops.higher_order.tag_activation_checkpoint
    )


def _options(node: fx.Node) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(node.kwargs.items()))


def _inline(module: fx.GraphModule, call: fx.Node, region: Region) -> None:
    body_node, *operands = call.args
    body = body_of(module, body_node)
    inline_checkpoints(body)
    # A region within a region joins the outer one's recomputation.
    meta = {REGION: call.meta.get(REGION, region)}
    with module.graph.inserting_before(call):
        results = copy_body(module, body, operands, f"checkpoint_{region.index}", meta)
    replace_results(call, results.__getitem__)
    erase_call(module, call, [body_node])
