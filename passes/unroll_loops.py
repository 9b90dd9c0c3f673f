"""Unroll the loops over a model's layers, so that every iteration has additions of its own.

A `scan` over stacked weights and a `while_loop` that counts are one node to the analysis. Where
what they carry on is a residual stream, this pass copies the body into the graph around it, once an
iteration. As with layers that share their weights, every iteration gets sites of its own. Loops
whose trip count nobody knows before they run, and those that carry no stream (a recurrence over
time) stay; the analysis says why.

Contract: the graph computes the same values; nothing but loops is removed.
"""

from __future__ import annotations

from typing import Any

import networkx as nx
import torch
from torch import fx

from attnres_compile.passes import operations as ops
from attnres_compile.passes.dataflow import Dataflow
from attnres_compile.passes.find_streams import find_streams
from attnres_compile.passes.graph_bodies import copy_body, erase_call, replace_results
from attnres_compile.passes.graph_editor import Editor
from attnres_compile.passes.inline_checkpoints import REGION
from attnres_compile.passes.loops import (
    ITERATION_OF,
    Loop,
    is_loop,
    loop_of,
    name_of,
    trip_count,
    two_iterations,
)

aten = torch.ops.aten

_OF_THE_CALL = (REGION, "nn_module_stack")
"""What copies take over from the call. An addition belongs to the module that runs the loop, since
torch.export forgets which modules a body calls, and sites are the same by every route."""


def unroll_loops(module: fx.GraphModule) -> int:
    """Unrolls the loops over layers of a graph module, in place; returns how many."""
    count = 0
    pending = [node for node in module.graph.nodes if is_loop(node)]
    for call in pending:
        loop = loop_of(module, call)
        trips = trip_count(loop)
        if isinstance(trips, str) or trips == 0 or not carries_stream(loop):
            continue
        before = set(module.graph.nodes)
        _unroll(module, loop, trips)
        pending += [node for node in module.graph.nodes if is_loop(node) and node not in before]
        count += 1
    if count:
        module.graph.lint()
        module.recompile()
    return count


def carries_stream(loop: Loop) -> bool:
    """Whether a residual addition stands between what is carried into two iterations and out.

    Its skip and its branch are both made of carried values: ``x = a + f(x)`` adds nothing up.
    """
    twice = two_iterations(loop)
    view = Dataflow.of(twice.module.graph)
    made = {node for start in twice.carried for node in (start, *nx.descendants(view.flow, start))}
    used = {node for end in twice.results for node in (end, *nx.ancestors(view.flow, end))}
    return any(
        is_loop(each) or sum(operand in made for operand in ops.operands(each)) > 1
        for each in _additions(twice.module, view)
        if each in made & used
    )


def _additions(module: fx.GraphModule, view: Dataflow) -> list[fx.Node]:
    """What is or was refused as a residual addition in a graph, and loops in it that carry some."""
    found = find_streams(module.graph)
    names = {refusal.node for refusal in found.refusals}
    names |= {addition.node.name for stream in found.streams for addition in stream.additions}
    inner = [node for node in view.order if is_loop(node)]
    carrying = [node for node in inner if carries_stream(loop_of(module, node))]
    return [node for node in view.order if node.name in names] + carrying


def _unroll(module: fx.GraphModule, loop: Loop, trips: int) -> None:
    call, state = loop.call, list(loop.carried)
    editor = Editor(module.graph, call)
    # A call in the owner's own forward is in no module: then its copies are in none either.
    meta = {ITERATION_OF: name_of(call), "nn_module_stack": {}}
    meta |= {key: call.meta[key] for key in _OF_THE_CALL if key in call.meta}
    outputs: list[list[Any]] = []
    with module.graph.inserting_before(call):
        for trip in range(trips):
            slices = [editor.call(aten.select.int, each, 0, trip) for each in loop.stacked]
            arguments = [*state, *slices, *loop.captured]
            results = copy_body(module, loop.body, arguments, call.name, meta)
            state = list(results[: len(state)])
            outputs.append(list(results[len(state) :]))

        def result(position: int) -> Any:
            if position < len(state):
                return state[position]
            return editor.call(aten.stack.default, [o[position - len(state)] for o in outputs], 0)

        replace_results(call, result)
    bodies = [each for each in call.args if isinstance(each, fx.Node)]
    erase_call(module, call, bodies)
