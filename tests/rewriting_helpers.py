"""Rewrite the streams of a tiny graph, and show what became of it."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from attnres_compile.config import AttnResConfig
from attnres_compile.passes.classify_readers import channel_dimension
from attnres_compile.passes.find_streams import find_streams
from attnres_compile.passes.graph_values import dtype_of, shape_of, value_of
from attnres_compile.passes.partition_blocks import partition_blocks
from attnres_compile.passes.redirect_reads import redirect_reads
from attnres_compile.passes.rewrite_deltas import deltas_first, rewrite_deltas
from attnres_compile.passes.rewrite_residuals import MixLayout, rewrite_residuals
from attnres_compile.passes.streams import ResidualStream
from attnres_compile.stream_plans import num_sources
from passes_helpers import Body, trace

MIX = torch.ops.attnres.mix.default


@dataclass(frozen=True)
class Rewritten:
    """A graph before and after the rewrite of all its streams.

    Attributes:
        sites: names of the nodes, before, of the states that have a mix now, in graph order.
        inserted: how many nodes of each operator the rewrite made.
        removed: names of the nodes that it erased.
    """

    before: fx.GraphModule
    after: fx.GraphModule
    sites: list[str]
    inserted: Counter[str] = field(default_factory=Counter)
    removed: list[str] = field(default_factory=list)


def rewrite(
    model: nn.Module | Body,
    *inputs: Any,
    route: str = "symbolic",
    config: AttnResConfig | None = None,
) -> Rewritten:
    """Traces a model or function and rewrites every stream of it."""
    return rewrite_module(trace(model, *inputs, route=route), config)


def rewrite_module(module: fx.GraphModule, config: AttnResConfig | None = None) -> Rewritten:
    """Rewrites every stream, with zero queries and gains of one as buffers of the graph module."""
    config = config or AttnResConfig(num_blocks="full")
    before = fx.GraphModule(module, copy.deepcopy(module.graph))
    names = [node.name for node in module.graph.nodes]
    streams = find_streams(module.graph, delta_sources=config.delta_sources).streams
    mixed: list[fx.Node] = []
    parameters: set[str] = set()
    redirect_reads(module.graph, streams)
    for number, stream in enumerate(deltas_first(streams, lambda stream: stream.deltas)):
        layout = _layout(stream, config)
        positions = [p for p, s in enumerate(stream.states) if s.reads and p > 0]
        given = {}
        for position in positions:
            made = _site_parameters(module, f"{number}_{position}", stream, layout)
            given[position] = made
            parameters |= {node.name for node in made}
        mixed += [stream.states[p].node for p in positions]
        sites = num_sources(stream, layout.block_sublayers)
        assert {p for p, count in sites.items() if count > 1} == set(positions)
        (rewrite_deltas if stream.deltas else rewrite_residuals)(
            module.graph, stream, layout, given
        )
    module.graph.lint()
    module.recompile()
    after = {node.name: node for node in module.graph.nodes}
    new = [node for name, node in after.items() if name not in {*names, *parameters}]
    order = {name: position for position, name in enumerate(names)}
    return Rewritten(
        before,
        module,
        sorted((node.name for node in mixed), key=order.__getitem__),
        Counter(_target(node) for node in new),
        [name for name in names if name not in after],
    )


def _layout(stream: ResidualStream, config: AttnResConfig) -> MixLayout:
    channel = channel_dimension(stream)
    assert channel is not None
    layers = [str(number) for number in range(len(stream.sublayers))]
    blocks = partition_blocks(layers, config)
    return MixLayout(blocks, config.aggregate == "sum", config.eps, channel)


def _site_parameters(
    module: fx.GraphModule, name: str, stream: ResidualStream, layout: MixLayout
) -> tuple[fx.Node, fx.Node]:
    state = stream.states[1].node  # in the root's layout
    width = shape_of(state)[layout.channel_dim]
    made = []
    for kind, value in (("query", 0.0), ("gain", 1.0)):
        tensor = torch.full((width,), value, dtype=dtype_of(state))
        module.register_buffer(f"{kind}_{name}", tensor)
        first = next(iter(module.graph.nodes))
        with module.graph.inserting_before(first):
            node = module.graph.get_attr(f"{kind}_{name}")
        example = value_of(state)
        fake = isinstance(example, FakeTensor)
        node.meta["val"] = example.fake_mode.from_tensor(tensor) if fake else tensor
        made.append(node)
    return made[0], made[1]


def text(graph: fx.Graph) -> str:
    """One line per operation: ``name = operator(arguments)``."""
    lines = []
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        values = [_shown(a) for a in node.args]
        values += [f"{key}={_shown(a)}" for key, a in node.kwargs.items()]
        call = "return " if node.op == "output" else f"{node.name} = {_target(node)}"
        lines.append(call + ("" if node.op == "output" else "(") + ", ".join(values))
        lines[-1] += "" if node.op == "output" else ")"
    return "\n".join(lines)


def _target(node: fx.Node) -> str:
    if node.op == "call_module":
        return f"self.{node.target}"
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target._schema.name).split("::")[-1]
    if node.target is operator.getitem:
        return "getitem"
    return str(getattr(node.target, "__name__", node.target))


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return str(value)


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what each node made, and what each mix was given, as it was then."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.made: dict[str, Tensor] = {}
        self.sums: list[Tensor] = []

    def run_node(self, node: fx.Node) -> Any:
        if node.target is MIX:
            sources = self.fetch_args_kwargs_from_env(node)[0][0]
            self.sums.append(torch.stack(list(sources)).sum(0))
        made = super().run_node(node)
        if isinstance(made, Tensor):
            self.made[node.name] = made.clone()
        return made


@dataclass(frozen=True)
class Run:
    """Results of a rewritten graph and of the graph before, on the same inputs.

    Attributes:
        states: per site, in graph order, the state of the graph before.
        source_sums: per mix, in graph order, the sum of its sources.
    """

    expected: Any
    actual: Any
    states: list[Tensor]
    source_sums: list[Tensor]


def run_both(rewritten: Rewritten, inputs: Sequence[Tensor]) -> Run:
    before, after = _Recorder(rewritten.before), _Recorder(rewritten.after)
    expected = before.run(*(value.clone() for value in inputs))
    actual = after.run(*(value.clone() for value in inputs))
    states = [before.made[name] for name in rewritten.sites]
    return Run(expected, actual, states, after.sums)
