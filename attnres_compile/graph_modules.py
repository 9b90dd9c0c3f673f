"""Convert a GraphModule or ExportedProgram: it is rewritten as it is and keeps its kind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from attnres_compile.capture import Captured, annotate_export, annotate_symbolic, unroll_exported
from attnres_compile.config import AttnResConfig
from attnres_compile.errors import AlreadyConvertedError, InputError
from attnres_compile.inputs import infer_inputs
from attnres_compile.module import AttnResSite
from attnres_compile.passes.find_streams import find_streams
from attnres_compile.passes.graph_values import value_of
from attnres_compile.passes.identify_additions import identify_additions
from attnres_compile.passes.redirect_reads import redirect_reads
from attnres_compile.passes.rewrite_deltas import deltas_first, rewrite_deltas
from attnres_compile.passes.rewrite_residuals import rewrite_residuals
from attnres_compile.passes.unroll_loops import unroll_loops
from attnres_compile.planning import plan_of_capture
from attnres_compile.plans import ConversionPlan, PlannedStream
from attnres_compile.stream_plans import stream_dtype

MakeParameter = Callable[[str, torch.Tensor], fx.Node]


def plan_graph(
    module: fx.GraphModule | torch.export.ExportedProgram,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    config: AttnResConfig,
) -> ConversionPlan:
    """What converting a graph would do to it.

    Raises:
        InputError: the graph has no example values and no example inputs were given.
        AlreadyConvertedError: the graph has our mixes.
    """
    if isinstance(module, torch.export.ExportedProgram):
        copied = fx.GraphModule(module.graph_module, copy.deepcopy(module.graph))
        unroll_exported(copied, module)
        annotate_export(copied)
        return _plan(copied, module.graph_module, config)
    return _plan(_annotated_copy(module, args, kwargs), module, config)


def convert_graph_module(
    module: fx.GraphModule,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    config: AttnResConfig,
) -> fx.GraphModule:
    """A GraphModule with mixes and new parameters under ``attnres``; shares the old parameters.

    Raises:
        InputError: the graph has no example values and no example inputs were given.
        AlreadyConvertedError: the graph has our mixes.
        NothingToConvertError: no residual stream can be converted.
    """
    converted = _annotated_copy(module, args, kwargs)
    planned = _plan(converted, module, config)
    planned.require_streams()
    first = next(iter(converted.graph.nodes))

    def make(name: str, initial: torch.Tensor) -> fx.Node:
        _add_parameter(converted, name, initial)
        with converted.graph.inserting_before(first):
            node = converted.graph.get_attr(name)
        node.meta["val"] = _fake_like(converted, initial)
        return node

    _rewrite(converted.graph, planned, make, _device(module))
    converted.graph.lint()
    converted.recompile()
    converted.__dict__["plan"] = planned
    return converted


def convert_exported(
    program: torch.export.ExportedProgram, config: AttnResConfig
) -> torch.export.ExportedProgram:
    """An ExportedProgram with mixes, whose new parameters are parameters of its signature.

    Raises:
        AlreadyConvertedError: the program has our mixes.
        NothingToConvertError: no residual stream can be converted.
    """
    converted = copy.deepcopy(program)
    module = converted.graph_module
    # A result of a loop that the program returns is named in its signature.
    with module._set_replace_hook(converted.graph_signature.get_replace_hook()):
        unroll_exported(module, converted)
    annotate_export(module)
    planned = _plan(module, module, config)
    planned.require_streams()
    specs = converted.graph_signature.input_specs
    first = next(iter(module.graph.nodes))
    added: list[InputSpec] = []

    def make(name: str, initial: torch.Tensor) -> fx.Node:
        with module.graph.inserting_before(first):
            node: fx.Node = module.graph.placeholder("p_" + name.replace(".", "_"))
        node.meta["val"] = _fake_like(module, initial)
        argument = TensorArgument(name=node.name)
        added.append(InputSpec(kind=InputKind.PARAMETER, arg=argument, target=name))
        converted.state_dict[name] = nn.Parameter(initial)
        return node

    device = next((t.device for t in program.state_dict.values()), torch.device("cpu"))
    # A state that the program returns is named in its signature.
    with module._set_replace_hook(converted.graph_signature.get_replace_hook()):
        _rewrite(module.graph, planned, make, device)
    specs[:0] = added
    module.graph.lint()
    module.recompile()
    module.__dict__["plan"] = planned
    converted.validate()  # type: ignore[no-untyped-call]
    converted.__dict__["plan"] = planned
    return converted


def is_rewritten(graph: fx.Graph) -> bool:
    """Whether a graph has mixes of ours."""
    return any(node.target is torch.ops.attnres.mix.default for node in graph.nodes)


def _annotated_copy(
    module: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
) -> fx.GraphModule:
    copied = fx.GraphModule(module, copy.deepcopy(module.graph))
    copied.train(module.training)
    if any(value_of(n) is None for n in copied.graph.nodes if n.op.startswith("call")):
        _propagate(copied, args, dict(kwargs or {}))
    unroll_loops(copied)
    annotate_symbolic(copied)
    return copied


def _plan(module: fx.GraphModule, model: nn.Module, config: AttnResConfig) -> ConversionPlan:
    if is_rewritten(module.graph):
        raise AlreadyConvertedError(
            "this graph was converted already; convert the graph that it was made from."
        )
    return plan_of_capture(Captured(module, "graph"), model, config, owner="")


def _rewrite(
    graph: fx.Graph, planned: ConversionPlan, make: MakeParameter, device: torch.device
) -> None:
    found = find_streams(graph, delta_sources=planned.config.delta_sources).streams
    identities = identify_additions(found)
    by_additions = {tuple(identities[a.node] for a in s.additions): s for s in found}
    redirect_reads(graph, found)
    given = [(stream, _parameters(stream, make, device)) for stream in planned.streams]
    for stream, parameters in deltas_first(given, lambda pair: pair[0].deltas):
        key = tuple((a.module_path, a.ordinal) for a in stream.additions)
        rewrite = rewrite_deltas if stream.deltas else rewrite_residuals
        rewrite(graph, by_additions[key], stream.mix_layout(planned.config), parameters)


def _parameters(
    stream: PlannedStream, make: MakeParameter, device: torch.device
) -> dict[int, tuple[fx.Node, fx.Node | None]]:
    nodes: dict[int, tuple[fx.Node, fx.Node | None]] = {}
    for site in stream.sites:
        if site.query_name is None:
            continue
        dtype = stream_dtype(stream)
        made = AttnResSite(
            stream.width, gain=site.gain_name is not None, dtype=dtype, device=device
        )
        query = make(site.query_name, made.query.detach())
        gain = None
        if site.gain_name is not None and made.gain is not None:
            gain = make(site.gain_name, made.gain.detach())
        nodes[site.state] = (query, gain)
    return nodes


def _add_parameter(module: nn.Module, name: str, value: torch.Tensor) -> None:
    *path, last = name.split(".")
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    module.register_parameter(last, nn.Parameter(value))


def _propagate(module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Gives every node an example value."""
    if not args and not kwargs:
        args, kwargs = infer_inputs(module)
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    values = list(args)
    for node in placeholders[len(args) :]:
        if str(node.target) in kwargs:
            values.append(kwargs[str(node.target)])
        elif node.args:
            values.append(node.args[0])
        else:
            raise InputError(f"the graph's input {node.target!r} is missing from args and kwargs.")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    FakeTensorProp(module, mode).propagate(*values)


def _fake_like(module: fx.GraphModule, value: torch.Tensor) -> Any:
    """A fake tensor of the graph's own mode, so that new nodes can be evaluated with it."""
    values = (value_of(node) for node in module.graph.nodes)
    fake = next((v for v in values if isinstance(v, FakeTensor)), None)
    return value if fake is None else fake.fake_mode.from_tensor(value, static_shapes=True)


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))
