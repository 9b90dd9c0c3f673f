"""Inline the bodies of activation-checkpointed regions, remembering which nodes they held.

Dynamo puts a checkpointed layer into a subgraph behind one `tag_activation_checkpoint` node, where
its residual additions cannot be seen. This pass copies each body into the graph around it. Every
copied node carries its region in ``node.meta[REGION]``, so that `outline_checkpoints` can restore
the regions after the rewrite.

Contract: the graph computes the same values; nothing but checkpoint nodes is removed.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

REGION = "attnres_checkpoint_region"


@dataclass(frozen=True)
class Region:
    """One activation-checkpointed region, with the options of the user's `checkpoint` call."""

    index: int
    options: tuple[tuple[str, Any], ...]


def inline_checkpoints(module: fx.GraphModule) -> int:
    """Inlines every checkpointed region of a graph module, in place; returns how many."""
    count = 0
    for node in list(module.graph.nodes):
        if _is_checkpoint(node):
            _inline(module, node, Region(count, _options(node)))
            count += 1
    if count:
        module.graph.lint()
        module.recompile()
    return count


def _is_checkpoint(node: fx.Node) -> bool:
    return (
        node.op == "call_function"
        and node.target is torch.ops.higher_order.tag_activation_checkpoint
    )


def _options(node: fx.Node) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(node.kwargs.items()))


def _inline(module: fx.GraphModule, call: fx.Node, region: Region) -> None:
    body_node, *operands = call.args
    assert isinstance(body_node, fx.Node)
    body = getattr(module, str(body_node.target))
    inline_checkpoints(body)  # a region within a region joins the outer one's recomputation
    values: dict[fx.Node, Any] = {}
    arguments = iter(operands)
    with module.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(arguments)
            elif node.op == "output":
                _replace_results(call, fx.node.map_arg(node.args[0], values.__getitem__))
            else:
                values[node] = _copy(module, body, node, values, region)
    module.graph.erase_node(call)
    if not body_node.users:
        module.graph.erase_node(body_node)


def _copy(
    module: fx.GraphModule,
    body: fx.GraphModule,
    node: fx.Node,
    values: dict[fx.Node, Any],
    region: Region,
) -> fx.Node:
    copied = module.graph.node_copy(node, values.__getitem__)
    copied.meta[REGION] = region
    if node.op == "get_attr":
        name = f"checkpoint_{region.index}_{str(node.target).replace('.', '_')}"
        setattr(module, name, _attribute(body, str(node.target)))
        copied.target = name
    return copied


def _attribute(owner: Any, path: str) -> Any:
    for part in path.split("."):
        owner = getattr(owner, part)
    return owner


def _replace_results(call: fx.Node, results: Any) -> None:
    """The call returns a tuple that is only ever indexed."""
    for user in list(call.users):
        assert user.target is operator.getitem, f"checkpoint result used by {user.format_node()}"
        user.replace_all_uses_with(results[user.args[1]])
        user.graph.erase_node(user)
