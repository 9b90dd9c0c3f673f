"""Which nodes of a graph a gradient comes back to from its outputs.

None comes to what no output is made of, to what is detached or made into an integer on the way, and
to what the model runs under ``torch.no_grad``. A query at such a place could never be trained.

And which streams gradients follow up to some place only: a mix passes gradients on to all of its
sources, and thus round a part of the carrier that runs under ``torch.no_grad``.
"""

from __future__ import annotations

from torch import fx

from attnres_compile.passes import operations as ops
from attnres_compile.passes.alterations import alteration_between
from attnres_compile.passes.dataflow import Dataflow, Reads
from attnres_compile.passes.gradient_modes import gradient_modes
from attnres_compile.passes.graph_values import dtype_of, is_tensor, module_path, source_line
from attnres_compile.passes.streams import Addition, Refusal, ResidualStream


def nodes_with_gradients(view: Dataflow) -> set[fx.Node]:
    """The nodes that some floating-point output depends on by floating-point values.

    Where there is no such output, the loss is taken by another call than this one: every node
    outside of ``no_grad`` counts.
    """
    silent = _without_gradients(view)
    outputs = [node for node in view.order if node.op == "output"]
    pending = [n for o in outputs for n in view.flow.predecessors(o) if _differentiable(n)]
    if not pending:
        return {node for node in view.order if node not in silent}
    found = {*outputs}
    for node in pending:
        if node not in found and node not in silent and ops.operation(node) != "detach":
            found.add(node)
            pending += [part for part in view.flow.predecessors(node) if _differentiable(part)]
    return found


def refuse_cut_gradients(view: Dataflow, stream: ResidualStream) -> Refusal | None:
    """Refuses a stream that runs under ``torch.no_grad`` in the middle.

    What its sources before that place are made of gets no gradient from its states after it.
    """
    cut = _cut(view, stream)
    if cut is None:
        return None
    return Refusal(
        "grad-mode",
        f"the stream runs under torch.no_grad from {ops.operation(cut)!r} at "
        f"{source_line(cut) or 'an unknown line'}, but not from its start to its end, so that "
        "mixes would pass gradients round that part; run all of it with gradients, or what it "
        "starts from without them too",
        module_path(cut),
        source_line(cut),
    )


def _cut(view: Dataflow, stream: ResidualStream) -> fx.Node | None:
    """Where the carrier first loses the gradients of a source, if a later state has some again."""
    silent = _without_gradients(view)
    if not silent:
        return None
    carrying = _carrying_gradients(view, silent)
    reads = Reads(view)
    root = stream.states[0].node
    carried, cut = root in carrying, None  # carried: whether some source so far has gradients
    for addition in stream.chain:
        way = _carrier_before(view, reads, addition) if addition.skip is not root else []
        if carried and cut is None:
            cut = next((node for node in way if node in silent), None)
        carried = carried or not carrying.isdisjoint(addition.branch)
        if carried and cut is None and addition.node in silent:
            cut = addition.node
        if cut is not None and addition.node not in silent:
            return cut
    return None


def _carrying_gradients(view: Dataflow, silent: set[fx.Node]) -> set[fx.Node]:
    """The nodes whose values may require gradients, as every parameter and input may."""
    found: set[fx.Node] = set()
    for node in view.order:
        if node in silent or ops.operation(node) == "detach" or not _differentiable(node):
            continue
        given = node.op in ("placeholder", "get_attr")
        if given or not found.isdisjoint(view.flow.predecessors(node)):
            found.add(node)
    return found


def _carrier_before(view: Dataflow, reads: Reads, addition: Addition) -> list[fx.Node]:
    """What the state before an addition passes on its way into it: alterations, copies, views."""
    end = reads.value_read(addition.skip, addition.node)
    alteration = alteration_between(view, reads, addition.previous, end)
    altered = alteration.cuts if alteration is not None else ()
    return [*altered, *reversed(view.path_to_origin(addition.skip)[:-1])]


def _without_gradients(view: Dataflow) -> set[fx.Node]:
    """The nodes that the model runs under ``torch.no_grad``."""
    modes = gradient_modes(view.order, at_start=True)
    return {node for node, mode in modes.items() if not mode.records}


def _differentiable(node: fx.Node) -> bool:
    """A real or complex tensor, or several results of which one may be."""
    if not is_tensor(node):
        return True
    return dtype_of(node).is_floating_point or dtype_of(node).is_complex
