"""Where the sites of a stream are, as a user names them: by the modules that read and run there.

A site of Llama is read by ``layers.3.input_layernorm``, and everybody calls it that of
``layers.3.self_attn``: the modules of its sublayer count too.
"""

from __future__ import annotations

from torch import fx

from attnres_compile.passes.dataflow import Dataflow
from attnres_compile.passes.graph_values import module_path
from attnres_compile.passes.streams import ResidualStream, State


def locate_sites(view: Dataflow, stream: ResidualStream) -> dict[int, tuple[str, ...]]:
    """By the position of its state: the paths of the modules that a site is about.

    Those of its readers, and of all that its sublayer computes from them.
    """
    nodes = list(view.order)
    own = {state.node for state in stream.states}
    located = {}
    for position, state in enumerate(stream.states):
        if not state.reads:
            continue
        readers = {read.user for read in state.reads}
        branches = _branches_after(stream.states[position + 1 :])
        after = nodes[min(view.order[reader] for reader in readers) :]
        onward = _depending(view, readers, [node for node in after if node not in own], branches)
        about = sorted(readers | _above(view, branches, onward), key=view.order.__getitem__)
        located[position] = tuple(dict.fromkeys(module_path(node) for node in about))
    return located


def _branches_after(states: tuple[State, ...]) -> list[fx.Node]:
    """The branches that are added up to the next read."""
    branches: list[fx.Node] = []
    for state in states:
        if state.addition is not None:
            branches += state.addition.branch
        if state.reads:
            break
    return branches


def _depending(
    view: Dataflow, on: set[fx.Node], nodes: list[fx.Node], branches: list[fx.Node]
) -> set[fx.Node]:
    """Of `nodes`, up to the last of the branches, those that depend on some others."""
    last = max((view.order[branch] for branch in branches), default=-1)
    found = set(on)
    for node in nodes:
        if view.order[node] > last:
            break
        if any(above in found for above in view.flow.predecessors(node)):
            found.add(node)
    return found


def _above(view: Dataflow, nodes: list[fx.Node], within: set[fx.Node]) -> set[fx.Node]:
    """Of `within`, those that `nodes` depend on, and these themselves."""
    pending = [node for node in nodes if node in within]
    found = set(pending)
    for node in pending:
        above = [p for p in view.flow.predecessors(node) if p in within and p not in found]
        found.update(above)
        pending += above
    return found
