"""Make a conversion plan: capture, analyse, choose owners, divide into blocks, name the sites."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from attnres_compile.capture import Captured, capture
from attnres_compile.config import AttnResConfig
from attnres_compile.errors import AlreadyConvertedError, ConfigError, InputError
from attnres_compile.inputs import infer_inputs
from attnres_compile.passes.classify_readers import (
    Reader,
    channel_dimension,
    classify_readers,
)
from attnres_compile.passes.dataflow import Dataflow
from attnres_compile.passes.find_existing import find_existing
from attnres_compile.passes.find_streams import (
    Refusal,
    ResidualStream,
    find_streams,
)
from attnres_compile.passes.graph_values import (
    ModuleCall,
    dtype_of,
    functions_around,
    module_calls,
    module_path,
    shape_of,
    source_line,
    value_of,
)
from attnres_compile.passes.identify_additions import identify_additions
from attnres_compile.passes.partition_blocks import layers_of, partition_blocks
from attnres_compile.plans import (
    ConversionPlan,
    PlannedAddition,
    PlannedStream,
    Site,
    Sublayer,
)

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Modules that people index and iterate over: an extra child would become one of their layers."""


def plan(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    config: AttnResConfig | None = None,
) -> ConversionPlan:
    """Says what `convert` would do to a model; changes and executes nothing.

    Args:
        model: any module that can be captured whole; weights may lie on the meta device.
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
    check_model(model)
    if not args and not kwargs:
        args, kwargs = infer_inputs(model)
    captured = capture(model, args, kwargs)
    return plan_of_capture(captured, model, config or AttnResConfig())


def plan_of_capture(
    captured: Captured, model: nn.Module, config: AttnResConfig, *, owner: str | None = None
) -> ConversionPlan:
    """The plan for a model that was captured already.

    `owner` fixes the module that will hold the parameters; otherwise it is chosen per stream.
    """
    graph = captured.module.graph
    name = type(model).__name__
    existing = find_existing(Dataflow.of(graph))
    if existing:
        return ConversionPlan(name, config, (), existing)
    analysis = find_streams(graph)
    refusals = list(analysis.refusals)
    found: list[tuple[ResidualStream, int]] = []
    for stream in analysis.streams:
        channel = channel_dimension(stream)
        refusal = _unusable(stream, channel)
        if refusal is None and channel is not None:
            found.append((stream, channel))
        elif refusal is not None:
            refusals.append(refusal)
    fixed = None if owner is None else ModuleCall(owner, "")
    owners = {id(s): fixed or _owner_call(s, model) for s in analysis.streams}
    ordinals = _ordinals_by_owner_call(analysis.streams, owners)
    planned = [_plan_stream(s, c, owners[id(s)].path, ordinals, config) for s, c in found]
    streams = _first_calls(planned)
    streams = _named_apart(streams)
    streams = _selected(streams, config)
    _check_depth(streams, config)
    return ConversionPlan(name, config, tuple(streams), tuple(refusals))


def check_model(model: nn.Module) -> None:
    """Refuses what can be told before a capture."""
    from attnres_compile.module import is_converted

    if not isinstance(model, nn.Module):
        raise InputError(f"expected a torch.nn.Module, not {type(model).__name__}.")
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


def _unusable(stream: ResidualStream, channel: int | None) -> Refusal | None:
    first = stream.additions[0].node
    where = (module_path(first), source_line(first))
    if channel is None:
        return Refusal(
            "channel-dimension",
            "it cannot be told which dimension of the stream is the channel: its readers and "
            "branches disagree",
            *where,
        )
    width = value_of(first).shape[channel]
    if not isinstance(width, int):
        return Refusal(
            "dynamic-width", "the channel dimension of the stream has no fixed size", *where
        )
    widths = {shape_of(state.node)[channel] for state in stream.states}
    if len(widths) > 1:
        return Refusal("reshaped-channel", "the channel dimension is reshaped on the way", *where)
    if len({value_of(state.node).device for state in stream.states}) > 1:
        return Refusal("mixed-devices", "the stream moves between devices", *where)
    return None


def _plan_stream(
    stream: ResidualStream,
    channel: int,
    owner: str,
    ordinals: dict[fx.Node, int],
    config: AttnResConfig,
) -> PlannedStream:
    paths = [module_path(addition.node) for addition in stream.additions]
    layers = layers_of([module_path(sublayer[0].node) for sublayer in stream.sublayers])
    sublayers = [
        Sublayer(tuple(_planned_addition(a.node, ordinals) for a in sublayer), layer)
        for sublayer, layer in zip(stream.sublayers, layers, strict=True)
    ]
    lengths = partition_blocks(layers, config)
    blocks = _grouped(sublayers, lengths)
    return PlannedStream(
        name=common_path(paths),
        owner=owner,
        root=_describe_root(stream),
        blocks=blocks,
        sites=_sites(stream, lengths, owner, config),
        width=shape_of(stream.states[1].node)[channel],
        channel_dim=channel,
        dtype=str(dtype_of(stream.states[-1].node)).removeprefix("torch."),
        methods=tuple(sorted({f for a in stream.additions for f in functions_around(a.node)})),
    )


def _planned_addition(node: fx.Node, ordinals: dict[fx.Node, int]) -> PlannedAddition:
    return PlannedAddition(module_path(node), ordinals[node], source_line(node))


def _owner_call(stream: ResidualStream, model: nn.Module) -> ModuleCall:
    """The innermost module one call of which holds every addition, and that can hold parameters."""
    calls = [module_calls(addition.node) for addition in stream.additions]
    levels: list[tuple[ModuleCall, ...]] = list(zip(*calls, strict=False))
    shared = [level[0] for level in levels if len({c.call for c in level}) == 1]
    for call in reversed(shared):
        if not isinstance(model.get_submodule(call.path), CONTAINERS):
            return call
    return ModuleCall("", "")


def _ordinals_by_owner_call(
    streams: Sequence[ResidualStream], owners: dict[int, ModuleCall]
) -> dict[fx.Node, int]:
    """Ordinals of all additions, counted within each call of each stream's owner."""
    ordinals: dict[fx.Node, int] = {}
    for stream in streams:
        owner = owners[id(stream)]
        inside = [s for s in streams if all(_is_inside(a.node, owner) for a in s.additions)]
        identities = identify_additions(inside)
        ordinals.update({a.node: identities[a.node][1] for a in stream.additions})
    return ordinals


def _is_inside(node: fx.Node, owner: ModuleCall) -> bool:
    return not owner.call or any(call.call == owner.call for call in module_calls(node))


def _grouped(
    sublayers: Sequence[Sublayer], lengths: Sequence[int]
) -> tuple[tuple[Sublayer, ...], ...]:
    blocks, start = [], 0
    for length in lengths:
        blocks.append(tuple(sublayers[start : start + length]))
        start += length
    return tuple(blocks)


def _describe_root(stream: ResidualStream) -> str:
    node = stream.states[0].node
    return module_path(node) or node.name


def _sites(
    stream: ResidualStream, lengths: Sequence[int], owner: str, config: AttnResConfig
) -> tuple[Site, ...]:
    names: Counter[str] = Counter()
    sites = []
    for position, sources in num_sources(stream, lengths).items():
        state = stream.states[position]
        readers = classify_readers(state)
        name = _site_name(readers, owner)
        names[name] += 1
        if names[name] > 1:
            name = f"{name}_{names[name]}"
        prefix = f"{owner}.attnres.{name}" if owner else f"attnres.{name}"
        has_query = sources > 1
        sites.append(
            Site(
                name=name,
                depth=state.depth,
                state=position,
                num_sources=sources,
                module_path=readers[0].module_path,
                readers=readers,
                query_name=f"{prefix}.query" if has_query else None,
                gain_name=f"{prefix}.gain" if has_query and config.key_gain else None,
            )
        )
    return tuple(sites)


def num_sources(stream: ResidualStream, lengths: Sequence[int]) -> dict[int, int]:
    """How many sources each site has, by its position among the states."""
    ends = {sum(lengths[: index + 1]) for index in range(len(lengths))}
    counts: dict[int, int] = {}
    completed = sublayers = 0
    additions_open = partial_open = False
    for position, state in enumerate(stream.states):
        if state.addition is not None:
            partial_open = True
            additions_open = additions_open or state.addition.is_residual
        if not state.reads:
            continue
        if additions_open:
            sublayers += 1
            additions_open = False
            if sublayers in ends:
                completed += 1
                partial_open = False
        counts[position] = 1 + completed + int(partial_open)
    return counts


def _site_name(readers: Sequence[Reader], owner: str) -> str:
    """``before_layers_3_mlp_norm``: the first reader, by its path below the owner."""
    first = readers[0]
    path = first.module_path
    inside = path.removeprefix(owner).strip(".") if owner else path
    if not inside:
        inside = first.operation
    return "before_" + "".join(c if c.isalnum() else "_" for c in inside)


def common_path(paths: Sequence[str]) -> str:
    """The longest path that all the paths go through."""
    split = [path.split(".") for path in paths]
    shared = []
    for level in zip(*split, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


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


def stream_dtype(stream: PlannedStream) -> torch.dtype:
    dtype = getattr(torch, stream.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype
