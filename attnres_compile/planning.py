"""Make a conversion plan: capture, analyse, choose owners, divide into blocks, name the sites."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from attnres_compile.call_shapes import describe_call
from attnres_compile.capture import Captured, capture
from attnres_compile.config import AttnResConfig
from attnres_compile.errors import AlreadyConvertedError, ConfigError, InputError
from attnres_compile.inputs import infer_inputs
from attnres_compile.passes.classify_readers import (
    channel_dimension,
)
from attnres_compile.passes.dataflow import Dataflow
from attnres_compile.passes.find_existing import find_existing
from attnres_compile.passes.find_streams import find_streams
from attnres_compile.passes.graph_values import (
    ModuleCall,
)
from attnres_compile.passes.streams import Refusal, ResidualStream
from attnres_compile.plans import (
    ConversionPlan,
    PlannedAddition,
    PlannedStream,
    Site,
)
from attnres_compile.stream_plans import ordinals_by_owner_call, owner_calls, plan_stream, unusable


def plan(
    model: nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    config: AttnResConfig | None = None,
) -> ConversionPlan:
    """Says what `convert` would do to a model; changes and executes nothing.

    Args:
        model: any module that can be captured whole, or a GraphModule or ExportedProgram; weights
            may lie on the meta device.
        args, kwargs: example inputs; inferred where the model says what it takes.
        config: the options; defaults as in `AttnResConfig`.

    Returns:
        The plan; ``print(plan)`` is a table. A model with nothing to convert gives a plan without
        streams, whose refusals say why.

    Raises:
        InputError: inputs are missing, or the model lies on several devices.
        CaptureError: the model cannot be captured whole.
        ConfigError: the options do not fit the model's streams.
        AlreadyConvertedError: the model was converted before.

    Example:
        >>> import torchvision
        >>> plan(torchvision.models.convnext_tiny()).num_residual_additions
        18
    """
    check_call(args, kwargs, config)
    if isinstance(model, torch.fx.GraphModule | torch.export.ExportedProgram):
        from attnres_compile.graph_modules import plan_graph

        return plan_graph(model, args, kwargs, config or AttnResConfig())
    check_model(model)
    given = bool(args or kwargs)
    if not given:
        args, kwargs = infer_inputs(model)
    captured = capture(model, args, kwargs)
    planned = plan_of_capture(captured, model, config or AttnResConfig())
    if not given:  # then they can be inferred again
        return planned
    return dataclasses.replace(planned, inputs=describe_call(args, kwargs))


def plan_of_capture(
    captured: Captured, model: nn.Module, config: AttnResConfig, *, owner: str | None = None
) -> ConversionPlan:
    """The plan for a model that was captured already.

    `owner` fixes the module that will hold the parameters; otherwise it is chosen per stream.
    """
    graph = captured.module.graph
    name, size = type(model).__name__, sum(p.numel() for p in model.parameters())
    view = Dataflow.of(graph)
    existing = find_existing(view)
    if existing:
        return ConversionPlan(name, config, (), existing, size)
    analysis = find_streams(graph, delta_sources=config.delta_sources)
    refusals = list(analysis.refusals)
    found: list[tuple[ResidualStream, int]] = []
    for stream in analysis.streams:
        channel = channel_dimension(stream)
        refusal = unusable(stream, channel, view.memory)
        if refusal is None and channel is not None:
            found.append((stream, channel))
        elif refusal is not None:
            refusals.append(refusal)
    if owner is None:
        owners = owner_calls(analysis.streams, model, view)
    else:
        owners = {id(s): ModuleCall(owner, "") for s in analysis.streams}
    ordinals = ordinals_by_owner_call(analysis.streams, owners)
    planned = [plan_stream(s, c, owners[id(s)].path, ordinals, config) for s, c in found]
    named = _named_apart(_first_calls(planned))
    streams = _selected(named, config)
    _check_depth(streams, config)
    left_out = [stream for stream in named if stream not in streams]
    refusals += [_left_out(addition) for stream in left_out for addition in stream.additions]
    return ConversionPlan(name, config, tuple(streams), tuple(refusals), size)


def check_call(args: object, kwargs: object, config: object) -> None:
    """Refuses arguments of another type than they have to be."""
    if not isinstance(args, tuple | list):
        raise InputError(
            f"args holds the positional inputs of one call, as a tuple; it is a "
            f"{type(args).__name__}: pass (x,) for one input x."
        )
    if not isinstance(kwargs, Mapping | None):
        raise InputError(
            f"kwargs holds the keyword inputs of one call, as a dictionary; it is a "
            f"{type(kwargs).__name__}."
        )
    if not isinstance(config, AttnResConfig | None):
        raise ConfigError(
            f"config must be an AttnResConfig, as in AttnResConfig(num_blocks=4); it is a "
            f"{type(config).__name__}."
        )


def check_model(model: nn.Module) -> None:
    """Refuses what can be told before a capture."""
    from attnres_compile.module import is_converted

    if not isinstance(model, nn.Module):
        raise InputError(f"expected a torch.nn.Module, not {type(model).__name__}.")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise InputError(
            "the model was compiled before; convert it first (torch.compile keeps it as "
            "model._orig_mod), and compile the converted one with backend='attnres'."
        )
    if is_converted(model):
        raise AlreadyConvertedError(
            f"{type(model).__name__} was converted already; convert the original, or strip() first."
        )
    devices = sorted({str(p.device) for p in model.parameters()})
    if len(devices) > 1:
        raise InputError(
            f"{type(model).__name__} lies on several devices ({', '.join(devices)}); move it to "
            "one device, convert it, and distribute it afterwards."
        )
    for path, module in model.named_modules():
        if path and type(module).__name__.startswith("FSDP"):
            raise InputError(
                f"{path} is wrapped by fully_shard; convert the model first and shard the "
                "converted model's root afterwards (per-layer FSDP2 is not supported yet)."
            )


def _first_calls(streams: list[PlannedStream]) -> list[PlannedStream]:
    """An owner that is called several times runs one stream each time; it is planned once."""
    seen: dict[tuple[str, tuple[tuple[str, int], ...]], PlannedStream] = {}
    for stream in streams:
        key = (stream.owner, tuple((a.module_path, a.ordinal) for a in stream.additions))
        seen.setdefault(key, stream)
    return list(seen.values())


def _named_apart(streams: list[PlannedStream]) -> list[PlannedStream]:
    """Distinct names for streams of one module, and for the sites of one owner."""
    taken: Counter[str] = Counter()
    sites_taken: dict[str, Counter[str]] = defaultdict(Counter)
    named = []
    for stream in streams:
        taken[stream.name] += 1
        name = stream.name or "stream"
        if taken[stream.name] > 1:
            name = f"{name}#{taken[stream.name]}"
        sites = []
        for site in stream.sites:
            sites_taken[stream.owner][site.name] += 1
            count = sites_taken[stream.owner][site.name]
            sites.append(site if count == 1 else _renamed(site, f"{site.name}_s{count}"))
        named.append(dataclasses.replace(stream, name=name, sites=tuple(sites)))
    return named


def _renamed(site: Site, name: str) -> Site:
    def moved(parameter: str | None) -> str | None:
        if parameter is None:
            return None
        prefix, _, last = parameter.rpartition(f"{site.name}.")
        return f"{prefix}{name}.{last}"

    return dataclasses.replace(
        site, name=name, query_name=moved(site.query_name), gain_name=moved(site.gain_name)
    )


def _selected(streams: list[PlannedStream], config: AttnResConfig) -> list[PlannedStream]:
    if config.streams is None:
        return streams
    names = [stream.name for stream in streams]
    for pattern in config.streams:
        if not any(_matches(name, pattern.removeprefix("!")) for name in names):
            raise ConfigError(
                f"streams={pattern!r} matches no residual stream of this model; it has: "
                f"{', '.join(names) or 'none'}."
            )
    wanted = [p for p in config.streams if not p.startswith("!")]
    unwanted = [p[1:] for p in config.streams if p.startswith("!")]
    return [
        stream
        for stream in streams
        if (not wanted or any(_matches(stream.name, p) for p in wanted))
        and not any(_matches(stream.name, p) for p in unwanted)
    ]


def _left_out(addition: PlannedAddition) -> Refusal:
    reason = "left out by the option streams"
    return Refusal("left-out", reason, addition.module_path, addition.source)


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")


def _check_depth(streams: list[PlannedStream], config: AttnResConfig) -> None:
    deepest = max((len(stream.sublayers) for stream in streams), default=0)
    asked = config.num_blocks
    if streams and isinstance(asked, int) and asked > deepest:
        raise ConfigError(
            f"num_blocks={asked} is more than the {deepest} sublayers of the model's deepest "
            f"stream; ask for at most {deepest}, or for 'full'."
        )
