"""Copy the body of a higher-order operator into the graph around it.

Dynamo and torch.export put what is checkpointed or repeated into a graph of its own, which is an
attribute of the module around it and the first arguments of one call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import fx


def body_of(module: fx.GraphModule, argument: Any) -> fx.GraphModule:
    """The graph that an argument of a higher-order operator names."""
    assert isinstance(argument, fx.Node)
    assert argument.op == "get_attr"
    body = attribute(module, str(argument.target))
    assert isinstance(body, fx.GraphModule)
    return body


def copy_body(
    module: fx.GraphModule,
    body: fx.GraphModule,
    arguments: Iterable[Any],
    label: str,
    meta: Mapping[str, Any],
) -> Any:
    """Copies a body to where the graph inserts, on these arguments; returns its results.

    Attributes that it reads become attributes of the module, named after the `label`; every copied
    node gets the entries of `meta`.
    """
    values: dict[fx.Node, Any] = {}
    given: Iterator[Any] = iter(arguments)
    for node in body.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "output":
            return fx.node.map_arg(node.args[0], values.__getitem__)
        else:
            values[node] = _copy(module, body, node, values, label)
            values[node].meta.update(meta)
    raise AssertionError("a graph ends with its output")


def replace_results(call: fx.Node, result: Callable[[int], Any]) -> None:
    """Puts other nodes in place of a call's results; the call returns a tuple that is indexed."""
    for user in list(call.users):
        assert user.target is operator.getitem, f"results used by {user.format_node()}"
        if user.users:
            user.replace_all_uses_with(result(int(user.args[1])))  # type: ignore[arg-type]
        user.graph.erase_node(user)


def erase_call(module: fx.GraphModule, call: fx.Node, bodies: Iterable[Any]) -> None:
    """Removes a call that nobody uses, and its bodies where no other call has them."""
    module.graph.erase_node(call)
    for argument in bodies:
        if argument.users:
            continue
        module.graph.erase_node(argument)
        still = (node.target for node in module.graph.nodes if node.op == "get_attr")
        if argument.target not in still:
            delattr(module, str(argument.target))


def attribute(owner: Any, path: str) -> Any:
    for part in path.split("."):
        owner = getattr(owner, part)
    return owner


def _copy(
    module: fx.GraphModule,
    body: fx.GraphModule,
    node: fx.Node,
    values: Mapping[fx.Node, Any],
    label: str,
) -> fx.Node:
    copied = module.graph.node_copy(node, values.__getitem__)
    if node.op == "get_attr":
        name = f"{label}_{str(node.target).replace('.', '_')}"
        setattr(module, name, attribute(body, str(node.target)))
        copied.target = name
    return copied
