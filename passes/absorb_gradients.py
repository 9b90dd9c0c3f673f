"""Let C++ add what it finds for the gradient of a source to what other sites have found before.

Every site gives each of its sources a gradient, and autograd adds them up: a pass over memory that
reads two tensors and writes one, for every source of every site. The backward pass of a site that
has a row of the gradient at hand adds what has arrived to it, and writes the sum in its place
(``write_in_place.py``).

Contract: values are the same to rounding; a sum is rounded once where it was rounded twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from attnres_compile.passes.cpp_calls import arguments_of, phase_of, set_argument, written_by
from attnres_compile.passes.graph_values import value_of

_ADD = torch.ops.aten.add.Tensor


def absorb_gradients(graph: fx.Graph) -> None:
    """Rewrites, in place, a sorted ATen graph with the operators of ``cpp_library.py``."""
    known = _known(graph)
    for call in list(graph.nodes):
        if phase_of(call) != "phase2_backward":
            continue
        given = arguments_of(call)
        for source, grad in zip(given["wanted"], given["grads"], strict=True):
            _absorb(graph, call, source, grad, known)


def _known(graph: fx.Graph) -> dict[fx.Node, int]:
    """The position of every node, and of memory that a call writes to that of the call."""
    known = {node: number for number, node in enumerate(graph.nodes)}
    calls = [node for node in graph.nodes if phase_of(node) is not None]
    return known | {room: known[call] for call in calls for room in written_by(call)}


def _absorb(
    graph: fx.Graph, call: fx.Node, source: int, grad: fx.Node, known: dict[fx.Node, int]
) -> None:
    arguments = arguments_of(call)
    readers = [user for user in grad.users if user is not call]
    if source in arguments["arrived"] or len(readers) != 1:
        return
    other = _other(readers[0], grad)
    # The later of two calls adds what the earlier one has found.
    if other is None or known[other] >= known[call]:
        return
    set_argument(call, "arriving", [*arguments["arriving"], other])
    set_argument(call, "arrived", [*arguments["arrived"], source])
    readers[0].replace_all_uses_with(grad)
    graph.erase_node(readers[0])


def _other(addition: fx.Node, grad: fx.Node) -> fx.Node | None:
    """What the gradient is added to, if it is added to rows like its own."""
    if addition.target is not _ADD or addition.kwargs:
        return None
    terms: list[Any] = [each for each in addition.args if each is not grad]
    if len(terms) != 1 or not isinstance(terms[0], fx.Node):
        return None
    own, other, total = (value_of(each) for each in (grad, terms[0], addition))
    alike = own.shape == other.shape == total.shape and own.dtype == other.dtype == total.dtype
    return terms[0] if alike and other.is_contiguous() else None
