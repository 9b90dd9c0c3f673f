"""Make a conversion plan: capture, analyse, choose owners, divide into blocks, name the sites."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from attnres_compile.call_shapes import describe_call
from attnres_compile.capture import Captured, capture
from attnres_compile.config import AttnResConfig
from attnres_compile.errors import AlreadyConvertedError, ConfigError, InputError
from attnres_compile.explaining import explain_plan
from attnres_compile.inputs import infer_inputs
from attnres_compile.passes.classify_readers import (
    channel_dimension,
)
from attnres_compile.passes.dataflow import Dataflow
from attnres_compile.passes.find_existing import find_existing
from attnres_compile.passes.find_streams import find_streams
from attnres_compile.passes.follow_gradients import nodes_with_gradients, refuse_cut_gradients
from attnres_compile.passes.graph_values import ModuleCall, module_path
from attnres_compile.passes.locate_sites import locate_sites
from attnres_compile.passes.streams import Refusal, ResidualStream
from attnres_compile.plans import ConversionPlan, PlannedStream, Site
from attnres_compile.selection import (
    SitePaths,
    blocks_by_stream,
    check_blocks,
    leave_out_untrained,
    select,
)
from attnres_compile.stream_plans import (
    common_path,
    ordinals_by_owner_call,
    owner_calls,
    plan_stream,
    trained_states,
    unusable,
)

Owners = dict[int, ModuleCall]
"""The call of the module that holds the parameters of each stream, by the stream's id."""

OwnersOf = Callable[[tuple[ResidualStream, ...], Dataflow], Owners]


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
    size = sum(p.numel() for p in model.parameters())

    def owners_of(streams: tuple[ResidualStream, ...], view: Dataflow) -> Owners:
        if owner is None:
            return owner_calls(streams, model, view)
        return {id(s): ModuleCall(owner, "") for s in streams}

    return plan_of_graph(captured.module.graph, type(model).__name__, size, config, owners_of)


def plan_of_graph(
    graph: fx.Graph, name: str, size: int, config: AttnResConfig, owners_of: OwnersOf
) -> ConversionPlan:
    """The plan for a graph with example values, of a model of this name and number of parameters.

    `owners_of` says which module is to hold the parameters of each stream.
    """
    view = Dataflow.of(graph)
    existing = find_existing(view)
    if existing:
        return ConversionPlan(name, config, (), existing, size)
    analysis = find_streams(graph, delta_sources=config.delta_sources)
    refusals = list(analysis.refusals)
    found: list[tuple[ResidualStream, int]] = []
    refused: list[tuple[ResidualStream, Refusal]] = []
    for stream in analysis.streams:
        channel = channel_dimension(stream)
        refusal = unusable(stream, channel, view.memory) or refuse_cut_gradients(view, stream)
        if refusal is None and channel is not None:
            found.append((stream, channel))
        elif refusal is not None:
            refused.append((stream, refusal))
    owners = owners_of(analysis.streams, view)
    ordinals = ordinals_by_owner_call(analysis.streams, owners)
    keys = [_call_key(stream, owners, ordinals) for stream, _ in found]
    first = _first_calls(keys, found)
    names = _stream_names([stream for stream, _ in first])
    options = dict(zip(names, blocks_by_stream(names, config), strict=True))
    trained = dict(zip(names, _trained(keys, found, view), strict=True))
    planned, silent = leave_out_untrained(
        _with_sites_apart(
            [
                plan_stream(s, c, name, owners[id(s)].path, ordinals, options[name])
                for (s, c), name in zip(first, names, strict=True)
            ]
        ),
        trained,
    )
    paths: SitePaths = {}
    if config.sites is not None:
        paths = {n: locate_sites(view, s) for (s, _), n in zip(first, names, strict=True)}
    streams, left_out = select(planned, paths, config)
    left_out |= silent
    check_blocks(streams, options)
    kept = {stream.name: stream for stream in streams}
    name_of = dict(zip(dict.fromkeys(keys), names, strict=True))
    called = [(stream, name_of[key]) for (stream, _), key in zip(found, keys, strict=True)]
    converted = [(stream, kept[name]) for stream, name in called if name in kept]
    unwanted = [(stream, left_out[name][0]) for stream, name in called if name in left_out]
    explanations = explain_plan(view, converted, [*refused, *unwanted], refusals)
    refusals += [refusal for _, refusal in refused]
    refusals += [refusal for of_stream in left_out.values() for refusal in of_stream]
    return ConversionPlan(
        name, config, tuple(streams), tuple(refusals), size, explanations=explanations
    )


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


CallKey = tuple[str, tuple[tuple[str, int], ...]]


def _call_key(
    stream: ResidualStream, owners: Mapping[int, ModuleCall], ordinals: Mapping[fx.Node, int]
) -> CallKey:
    """The same for the streams of all calls of one owner."""
    identities = tuple((module_path(a.node), ordinals[a.node]) for a in stream.additions)
    return owners[id(stream)].path, identities


def _first_calls(
    keys: list[CallKey], streams: list[tuple[ResidualStream, int]]
) -> list[tuple[ResidualStream, int]]:
    """An owner that is called several times runs one stream each time; it is planned once."""
    first: dict[CallKey, tuple[ResidualStream, int]] = {}
    for key, stream in zip(keys, streams, strict=True):
        first.setdefault(key, stream)
    return list(first.values())


def _trained(
    keys: list[CallKey], streams: list[tuple[ResidualStream, int]], view: Dataflow
) -> list[set[int]]:
    """For each owner's stream: the states whose queries get a gradient from one of its calls."""
    reached = nodes_with_gradients(view)
    trained: dict[CallKey, set[int]] = defaultdict(set)
    for key, (stream, _) in zip(keys, streams, strict=True):
        trained[key] |= trained_states(stream, reached)
    return list(trained.values())


def _stream_names(streams: list[ResidualStream]) -> list[str]:
    """Distinct names: the path that all the additions go through, numbered where two have one."""
    taken: Counter[str] = Counter()
    names = []
    for stream in streams:
        path = common_path([module_path(addition.node) for addition in stream.additions])
        name = path or "stream"
        taken[name] += 1
        names.append(name if taken[name] == 1 else f"{name}#{taken[name]}")
    return names


def _with_sites_apart(streams: list[PlannedStream]) -> list[PlannedStream]:
    """Distinct names for the sites of one owner."""
    taken: dict[str, Counter[str]] = defaultdict(Counter)
    named = []
    for stream in streams:
        sites = []
        for site in stream.sites:
            taken[stream.owner][site.name] += 1
            count = taken[stream.owner][site.name]
            sites.append(site if count == 1 else _renamed(site, f"{site.name}_s{count}"))
        named.append(dataclasses.replace(stream, sites=tuple(sites)))
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
