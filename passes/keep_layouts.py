"""Give back the layouts with which a graph was traced, where phases have other ones.

A mix lies in memory as its first source does, and what reads it was traced with that: `view` may
merge two dimensions of transposed tokens, which rows of channels do not allow. The results of
phases are rows of channels. So what takes another node's place remembers how that one lay, and
where the two differ and somebody but phases reads it, it is copied once.

Contract: values are the same bit for bit, and readers get the order in memory that they were traced
with, unless it depends on a size that only the data decide.
A graph whose streams lie row by row is not changed.
"""

from __future__ import annotations

import torch
from torch import fx

from attnres_compile.kernels import phases
from attnres_compile.passes.graph_editor import Editor
from attnres_compile.passes.graph_values import shape_of, strides_of

aten = torch.ops.aten
_TRACED = "attnres_traced_strides"

assert phases.phase2 is not None  # has registered the operators
PHASES = (
    torch.ops.attnres.complete.default,
    torch.ops.attnres.phase1.default,
    torch.ops.attnres.phase2.default,
)


def put_in_place_of(old: fx.Node, new: fx.Node) -> None:
    """Gives the readers of a node another one of the same values, which remembers its strides."""
    strides = strides_of(old)
    if -1 not in strides:  # of a size that only the data decide, nothing is known
        new.meta[_TRACED] = strides
    old.replace_all_uses_with(new)


def keep_layouts(graph: fx.Graph) -> None:
    """Copies what does not lie as what it took the place of, in place."""
    for node in list(graph.nodes):
        traced = node.meta.pop(_TRACED, None)
        # Phases take any layout. They get the copy too if there is one, since readers may write.
        if traced is None or all(user.target in PHASES for user in node.users):
            continue
        order = _order(traced)
        if not _is_ascending(order, shape_of(node)):
            _lay_out(node, order)


def _order(strides: tuple[int, ...]) -> list[int]:
    """The dimensions, from the outermost in memory to the innermost."""
    return sorted(range(len(strides)), key=lambda d: -strides[d])


def _is_ascending(order: list[int], shape: tuple[int, ...]) -> bool:
    """Whether it is that of contiguous memory, in which dimensions of size 1 stand anywhere."""
    long = [d for d in order if shape[d] != 1]
    return long == sorted(long)


def _lay_out(node: fx.Node, order: list[int]) -> None:
    with node.graph.inserting_before(node.next):
        edit = Editor(node.graph, node)
        permuted = edit.call(aten.permute.default, node, order)
        copied = edit.call(aten.clone.default, permuted, memory_format=torch.contiguous_format)
        inverse = sorted(range(len(order)), key=order.__getitem__)
        laid_out = edit.call(aten.permute.default, copied, inverse)
    node.replace_all_uses_with(laid_out, delete_user_cb=lambda user: user is not permuted)
