"""Plan one stream: owner, identities of the additions, blocks, and names of the sites."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Mapping, Sequence
from itertools import pairwise

import torch
from torch import fx, nn

from attnres_compile.config import AttnResConfig
from attnres_compile.containers import CONTAINERS, asks_for_children
from attnres_compile.passes.classify_readers import Reader, classify_readers
from attnres_compile.passes.dataflow import Dataflow, Reads
from attnres_compile.passes.graph_values import (
    ModuleCall,
    dtype_of,
    functions_around,
    is_tensor,
    module_calls,
    module_path,
    shape_of,
    source_line,
    value_of,
)
from attnres_compile.passes.identify_additions import identify_additions
from attnres_compile.passes.operations import mixes_elements, operation, writes_into
from attnres_compile.passes.partition_blocks import layers_of, partition_blocks
from attnres_compile.passes.streams import Refusal, ResidualStream
from attnres_compile.plans import PlannedAddition, PlannedStream, Site, Sublayer


def unusable(
    stream: ResidualStream, channel: int | None, memory: Mapping[fx.Node, fx.Node]
) -> Refusal | None:
    first = stream.additions[0].node
    where = (module_path(first), source_line(first))
    if any(node.op == "placeholder" for node in written_memory(stream, memory)):
        return Refusal(
            "overwritten",
            "the stream is written in place into an input of the model; add out of place, or to a "
            "copy of it",
            *where,
        )
    if channel is None:
        return Refusal(
            "channel-dimension",
            "it cannot be told which dimension of the stream is the channel: its readers and "
            "branches disagree",
            *where,
        )
    if channel == 0:
        return Refusal(
            "unbatched-convolution",
            "the stream goes through convolutions without a batch dimension, so its channel is "
            "dimension 0, which is not supported; add a batch dimension of one",
            *where,
        )
    width = value_of(first).shape[channel]
    if not isinstance(width, int):
        return Refusal(
            "dynamic-width", "the channel dimension of the stream has no fixed size", *where
        )
    widths = {shape_of(state.node)[channel] for state in stream.states if not state.turns}
    if len(widths) > 1:
        return Refusal("reshaped-channel", "the channel dimension is reshaped on the way", *where)
    if len({value_of(state.node).device for state in stream.states}) > 1:
        return Refusal("mixed-devices", "the stream moves between devices", *where)
    return None


def trained_states(stream: ResidualStream, with_gradients: Container[fx.Node]) -> set[int]:
    """The positions of the states that a gradient comes back to from some reader."""
    return {
        position
        for position, state in enumerate(stream.states)
        if state.node in with_gradients and any(r.user in with_gradients for r in state.reads)
    }


def plan_stream(
    stream: ResidualStream,
    channel: int,
    name: str,
    owner: str,
    ordinals: dict[fx.Node, int],
    config: AttnResConfig,
) -> PlannedStream:
    layers = layers_of([module_path(sublayer[0].node) for sublayer in stream.sublayers])
    sublayers = [
        Sublayer(tuple(_planned_addition(a.node, ordinals) for a in sublayer), layer)
        for sublayer, layer in zip(stream.sublayers, layers, strict=True)
    ]
    lengths = partition_blocks(layers, config)
    blocks = _grouped(sublayers, lengths)
    return PlannedStream(
        name=name,
        owner=owner,
        root=_describe_root(stream),
        blocks=blocks,
        sites=_sites(stream, lengths, owner, config),
        width=shape_of(stream.states[1].node)[channel],
        channel_dim=channel,
        dtype=str(dtype_of(stream.states[-1].node)).removeprefix("torch."),
        methods=tuple(sorted({f for a in stream.additions for f in functions_around(a.node)})),
        deltas=stream.deltas,
    )


def _planned_addition(node: fx.Node, ordinals: dict[fx.Node, int]) -> PlannedAddition:
    return PlannedAddition(module_path(node), ordinals[node], source_line(node))


def owner_calls(
    streams: Sequence[ResidualStream], model: nn.Module, view: Dataflow
) -> dict[int, ModuleCall]:
    """The owner of each stream, by its id, and the call of the owner that the stream is in.

    It is the innermost module one call of which holds every addition, the paths that make these
    residual additions, and the memory that any of them writes into (mixes do not write into what
    the caller gave), and every other call of which holds such streams too: its forward is
    rewritten, whoever calls it.
    """
    reads = Reads(view)
    possible = {id(stream): _possible_owners(stream, model) for stream in streams}
    for stream in streams:
        possible[id(stream)] = [
            owner
            for owner in possible[id(stream)]
            if all(_is_inside(node, owner) for node in written_memory(stream, view.memory))
            and _is_residual_inside(stream, owner, view, reads)
        ]
    calls = _calls_by_path(view)
    while True:
        owners = {identity: options[0] for identity, options in possible.items()}
        uneven = _unevenly_called(streams, owners, calls)
        if not uneven:
            return owners
        for identity, owner in owners.items():
            if owner.path in uneven:
                possible[identity].pop(0)


def _is_residual_inside(
    stream: ResidualStream, owner: ModuleCall, view: Dataflow, reads: Reads
) -> bool:
    """Whether the owner sees, when it runs alone, what makes the additions a stream.

    These are absorbed additions, and the paths by which branches depend on their root. In a U-net
    the skip and the upsampled states may both come to the decoder as arguments; that one is made of
    the other shows only where the encoder is called too.
    """
    if not owner.call:
        return True
    root_of: dict[fx.Node, fx.Node] = {}
    for addition in stream.chain:
        if not _is_inside(addition.node, owner):  # absorbed before or after the owner's call
            return False
        root_of[addition.node] = root_of.get(addition.previous, addition.previous)
    bit = {root: 1 << index for index, root in enumerate(dict.fromkeys(root_of.values()))}
    reached: dict[fx.Node, int] = dict.fromkeys(view.order, 0)
    mixed: dict[fx.Node, int] = dict.fromkeys(view.order, 0)
    for node in view.order:
        if not _is_inside(node, owner):
            continue
        for part in view.flow.predecessors(node):
            read = reads.value_read(part, node) if is_tensor(part) else part
            reached[node] |= reached[part] | bit.get(part, 0) | bit.get(read, 0)
            mixed[node] |= mixed[part]
        if mixes_elements(node):
            mixed[node] |= reached[node]
    return all(
        any(mixed[reads.value_read(part, a.node)] & bit[root_of[a.node]] for part in a.branch)
        for a in stream.additions
    )


def written_memory(stream: ResidualStream, memory: Mapping[fx.Node, fx.Node]) -> list[fx.Node]:
    """The nodes that made the memory into which additions of a stream write in place."""
    nodes = [state.node for state in stream.states[1:]]
    return [memory[node] for node in nodes if writes_into(node) is not None]


def _possible_owners(stream: ResidualStream, model: nn.Module) -> list[ModuleCall]:
    """Innermost first, without containers, which people index and iterate over; then the model.

    Nor those that run whatever children they have. The model may be a container itself (see
    `containers.py`).
    """
    calls = [module_calls(addition.node) for addition in stream.additions]
    levels: list[tuple[ModuleCall, ...]] = list(zip(*calls, strict=False))
    shared = [level[0] for level in levels if len({c.call for c in level}) == 1]
    inner = [c for c in shared if _may_hold_parameters(model.get_submodule(c.path))]
    return [*reversed(inner), ModuleCall("", "")]


def _may_hold_parameters(module: nn.Module) -> bool:
    return not isinstance(module, CONTAINERS) and not asks_for_children(type(module))


def _calls_by_path(view: Dataflow) -> dict[str, set[str]]:
    calls: dict[str, set[str]] = defaultdict(set)
    for node in view.order:
        for call in module_calls(node):
            calls[call.path].add(call.call)
    return calls


def _unevenly_called(
    streams: Sequence[ResidualStream],
    owners: dict[int, ModuleCall],
    calls: dict[str, set[str]],
) -> set[str]:
    """Owners, other than the model, of which different calls run different streams."""
    ordinals = ordinals_by_owner_call(streams, owners)
    run: dict[tuple[str, str], set[tuple[tuple[str, int], ...]]] = defaultdict(set)
    for stream in streams:
        owner = owners[id(stream)]
        key = tuple((module_path(a.node), ordinals[a.node]) for a in stream.additions)
        run[owner.path, owner.call].add(key)
    paths = {owner.path for owner in owners.values() if owner.path}
    return {
        path
        for path in paths
        if any(run[path, call] != run[path, other] for call, other in pairwise(calls[path]))
    }


def ordinals_by_owner_call(
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
    made_by = stream.chain[0].previous
    if made_by.op == "placeholder":
        return "the input"
    return module_path(made_by) or operation(made_by)


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
        partial_open = partial_open or position > 0
        if state.addition is not None:
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


def stream_dtype(stream: PlannedStream) -> torch.dtype:
    dtype = getattr(torch, stream.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype
