"""What a scan or while_loop in a graph repeats, and how often.

The depth of a model does not depend on its inputs. So the trip count of a loop is known where a
`scan` runs over weights (or over what is made without the inputs, as ``torch.arange(layers)`` is),
and where a `while_loop` counts: its condition follows from carried numbers that start from
constants.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from attnres_compile.passes import operations as ops
from attnres_compile.passes.dataflow import Dataflow
from attnres_compile.passes.graph_bodies import body_of, copy_body
from attnres_compile.passes.graph_values import (
    CONSTANT,
    dtype_of,
    is_weight,
    shape_of,
    source_line,
    value_of,
)
from attnres_compile.passes.inline_checkpoints import inline_checkpoints

MOST_TRIPS = 1000
ITERATION_OF = "attnres_loop"
"""Key of `node.meta` for the name of the loop that a node was unrolled from."""
_UNKNOWN = frozenset(
    "rand randn randint randperm bernoulli normal multinomial poisson rand_like randn_like"
    " randint_like empty empty_like empty_strided new_empty new_empty_strided".split()
)
"""Operators whose result is chance, or what was in its memory before."""
_NEW = frozenset("new_zeros new_ones new_full".split())
"""Operators that know of the tensor they belong to its dtype and device, and nothing else."""
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Loop:
    """One call of `scan` or `while_loop`.

    Attributes:
        call: the node; its results are the carried values, then a scan's outputs, stacked.
        body: what an iteration computes, of its carried values, slices and captured values.
        carried: what the carried values start from.
        stacked: what a scan takes a slice of in every iteration.
        captured: what every iteration gets as it is.
        condition: of a while_loop: whether another iteration follows, of the arguments of the body.
    """

    call: fx.Node
    body: fx.GraphModule
    carried: tuple[Any, ...]
    stacked: tuple[fx.Node, ...]
    captured: tuple[Any, ...]
    condition: fx.GraphModule | None

    @property
    def inputs(self) -> list[fx.Node]:
        """The placeholders of the body."""
        return self.body.graph.find_nodes(op="placeholder")

    @property
    def results(self) -> list[Any]:
        """What an iteration returns: the carried values, then a scan's outputs."""
        return list(self.body.graph.output_node().args[0])  # type: ignore[arg-type]


def is_loop(node: fx.Node) -> bool:
    return node.target in (torch.ops.higher_order.scan, torch.ops.higher_order.while_loop)


def name_of(call: fx.Node) -> str:
    """A loop as a person knows it: ``scan at model.py:123``."""
    return f"{call.target} at {source_line(call) or call.name}"


def loops_behind(graph: fx.Graph) -> list[str]:
    """The names of the loops that a graph has or had, before they were unrolled."""
    found = {name_of(node) for node in graph.nodes if is_loop(node)}
    found |= {node.meta[ITERATION_OF] for node in graph.nodes if ITERATION_OF in node.meta}
    return sorted(found)


def loop_of(module: fx.GraphModule, call: fx.Node) -> Loop:
    """The parts of a call for which `is_loop` holds."""
    arguments: list[Any] = list(call.args)
    if call.target is torch.ops.higher_order.scan:
        body, carried, stacked, captured = arguments
        return Loop(call, body_of(module, body), (*carried,), (*stacked,), (*captured,), None)
    condition, body, carried, captured = arguments
    checked = body_of(module, condition)
    return Loop(call, body_of(module, body), (*carried,), (), (*captured,), checked)


@dataclass(frozen=True)
class Iterations:
    """The first two iterations of a loop, in a graph of their own.

    Attributes:
        module: the graph; its inputs are those of the body, then the slices of the second time.
        carried: the inputs that the carried values start from.
        results: what becomes of these.
    """

    module: fx.GraphModule
    carried: list[fx.Node]
    results: list[fx.Node]


def two_iterations(loop: Loop) -> Iterations:
    """What carries on from one iteration to the next: in one body its inputs are unrelated."""
    module = fx.GraphModule(nn.Module(), fx.Graph())
    first = [module.graph.node_copy(each) for each in loop.inputs]
    count, end = len(loop.carried), len(loop.carried) + len(loop.stacked)
    slices = [module.graph.node_copy(each) for each in loop.inputs[count:end]]
    for each in slices:
        each.target = each.name  # no two inputs of one name
    state = copy_body(module, loop.body, first, "first", {})[:count]
    second = [*state, *slices, *first[end:]]
    results = copy_body(module, loop.body, second, "second", {})
    module.graph.output(results)
    inline_checkpoints(module)
    outputs: Any = module.graph.output_node().args[0]
    carried_on = [each for each in outputs[:count] if isinstance(each, fx.Node)]
    return Iterations(module, first[:count], carried_on)


def trip_count(loop: Loop) -> int | str:
    """How often the body runs, whatever the inputs are; or why that is not known."""
    if loop.condition is not None:
        return _counted_trips(loop, loop.condition)
    if not all(_is_made_of_weights(each) for each in loop.stacked):
        return "runs over a dimension of the inputs, whose size is not a depth of the model"
    trips = shape_of(loop.stacked[0])[0]
    return trips if trips <= MOST_TRIPS else f"takes {trips} iterations, more than {MOST_TRIPS}"


def _is_made_of_weights(node: fx.Node) -> bool:
    """Whether no input of the model has a part in a value."""
    pending = [node]
    for current in pending:
        if current.op == "placeholder" and not is_weight(current):
            return False
        pending += [each for each in _sources(current) if each not in pending]
    return True


class _NotConstantError(Exception):
    """A value that depends on the inputs, on a weight, on chance or on a write; says which."""


def _counted_trips(loop: Loop, condition: fx.GraphModule) -> int | str:
    """Runs the carried numbers that the condition depends on, and nothing else."""
    another = condition.graph.output_node().args[0]
    condition_inputs = condition.graph.find_nodes(op="placeholder")
    counters = _counters(loop, condition_inputs, another)
    starts = [*loop.carried, *loop.captured]
    graphs = (loop.call.graph, loop.body.graph, condition.graph)
    written = frozenset(node for graph in graphs for node in _overwritten(graph))
    try:
        with torch.no_grad(), unset_fake_temporarily(), _CPU:
            values = {i: _evaluate(starts[i], {}, written) for i in sorted(counters)}
            for trips in range(MOST_TRIPS + 1):
                seen = {condition_inputs[i]: value for i, value in values.items()}
                if not _evaluate(another, seen, written):
                    return trips
                known = {loop.inputs[i]: value for i, value in values.items()}
                carried = [i for i in values if i < len(loop.carried)]
                values |= {i: _evaluate(loop.results[i], known, written) for i in carried}
    except _NotConstantError as unknown:
        return f"takes a number of iterations that depends on {unknown}"
    return f"takes more than {MOST_TRIPS} iterations"


def _counters(loop: Loop, condition_inputs: list[fx.Node], another: Any) -> set[int]:
    """The positions of the carried and captured values that the condition depends on."""
    found = {condition_inputs.index(each) for each in _inputs_of([another])}
    pending = list(found)
    for position in pending:
        if position < len(loop.carried):
            before = {loop.inputs.index(each) for each in _inputs_of([loop.results[position]])}
            pending += before - found
            found |= before
    return found


def _inputs_of(values: Iterable[Any]) -> set[fx.Node]:
    pending = [value for value in values if isinstance(value, fx.Node)]
    for current in pending:
        pending += [each for each in _sources(current) if each not in pending]
    return {node for node in pending if node.op == "placeholder"}


def _sources(node: fx.Node) -> list[fx.Node]:
    """What the values of a node, and how many they are, come from."""
    return node.all_input_nodes[ops.operation(node) in _NEW :]


def _overwritten(graph: fx.Graph) -> list[fx.Node]:
    """The nodes in whose memory something is written: what made them does not say their value."""
    view = Dataflow.of(graph)
    changed = {
        made_by
        for made_by, writers in view.writers.items()
        if any(ops.operation(writer) != "detach" for writer in writers)  # as an export adds
    }
    return [node for node, made_by in view.memory.items() if made_by in changed]


def _evaluate(value: Any, known: Mapping[fx.Node, Any], written: frozenset[fx.Node]) -> Any:
    """The number behind a node, computed from constants and what is `known`; none is `written`."""
    if not isinstance(value, fx.Node):
        return _CPU if isinstance(value, torch.device) else value
    if value in written:
        raise _NotConstantError(f"{value.name!r}, which is written in place")
    if value in known:
        return known[value]
    if CONSTANT in value.meta:
        return value.meta[CONSTANT]
    if not value.op.startswith("call") or not callable(_function(value)):
        raise _NotConstantError(f"{'a weight' if is_weight(value) else 'an input'}, {value.name!r}")
    name, args = ops.operation(value), value.args
    if name in _UNKNOWN:
        raise _NotConstantError(f"the result of {name!r}")
    if not _is_one_number(value_of(value)):
        raise _NotConstantError(f"the result of {name!r}, which is not one number")
    if name in _NEW:
        args = (torch.empty((), dtype=dtype_of(value.all_input_nodes[0])), *args[1:])
    args, kwargs = fx.node.map_aggregate(
        (args, value.kwargs), lambda part: _evaluate(part, known, written)
    )
    if "device" in kwargs:  # a name: of the meta device, too, where no number can be read
        kwargs = {**kwargs, "device": _CPU}
    return _function(value)(*args, **kwargs)


def _function(node: fx.Node) -> Any:
    if node.op == "call_method":
        return lambda self, *args, **kwargs: getattr(self, str(node.target))(*args, **kwargs)
    return node.target


def _is_one_number(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) or value.numel() == 1
