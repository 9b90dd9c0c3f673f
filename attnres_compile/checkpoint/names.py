"""The parameter names and units of Kimi K3 checkpoints and of flash-linear-attention models.

Both keep, per transformer layer, a query and a key gain before attention and before the MLP, and a
last pair before the final norm. The query is the weight [1, D] of a linear layer, the gain that of
an RMSNorm. Both have the mean form, and a pair for the very first read too, which has one source
and so no effect: here it is kept as it is, and nothing reads it.

Kimi K3 counts layers per block, flash-linear-attention sublayers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnres_compile.checkpoint.record import Record
from attnres_compile.errors import CheckpointError, ConfigError
from attnres_compile.plans import ConversionPlan, PlannedStream, Site


@dataclass(frozen=True)
class Naming:
    """How one project names its parameters.

    Attributes:
        title: of the project, for messages.
        attention, mlp, output: prefixes of the pairs before attention, MLP and final norm.
        block_key: the config key of the block size.
        counts_layers: whether that counts layers, not sublayers.
    """

    title: str
    attention: str
    mlp: str
    output: str
    block_key: str
    counts_layers: bool

    def pair(self, site: str) -> tuple[str, str]:
        """Names of query and gain under a path."""
        return f"{site}_proj.weight", f"{site}_norm.weight"

    @property
    def pattern(self) -> re.Pattern[str]:
        """Every name of this project, with the path of its layer or model in front."""
        layer = rf"layers\.(?P<layer>\d+)\.(?P<kind>{self.attention}|{self.mlp})"
        return re.compile(
            rf"(?P<prefix>(?:.+\.)?)(?:{layer}|(?P<output>{self.output}))_(?P<part>proj|norm)\.weight"
        )


NAMINGS = {
    "kimi": Naming(
        "Kimi K3",
        "self_attention_res",
        "mlp_res",
        "output_attn_res",
        "attn_res_block_size",
        counts_layers=True,
    ),
    "fla": Naming(
        "flash-linear-attention",
        "attn_res",
        "mlp_res",
        "res",
        "attnres_block_size",
        counts_layers=False,
    ),
}


def to_file(
    record: Record, tensors: Mapping[str, Tensor], extras: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The new parameters as a file of the record's naming holds them.

    Args:
        record: the layout; its `names` say whose names to use.
        tensors: queries and gains by our own names.
        extras: what a file of that naming had beyond them.

    Raises:
        ConfigError: the layout cannot be written in these names; says what could.
    """
    if record.names == "native":
        return {**tensors, **extras}
    naming = NAMINGS[record.names]
    foreign = foreign_names(record.plan, record.names)
    written = {
        foreign[name]: tensor.reshape(1, -1) if name.endswith(".query") else tensor
        for name, tensor in tensors.items()
    }
    return {**written, **_first_pair(record.plan, naming, tensors), **extras}


def from_file(
    record: Record, found: Mapping[str, Tensor], place: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Queries and gains by our own names, and what else the file holds of that naming.

    Raises:
        CheckpointError: a query is not [1, D].
    """
    if record.names == "native":
        extras = {name: found[name] for name in record.extras if name in found}
        return {name: found[name] for name in found if name not in extras}, extras
    ours = {theirs: name for name, theirs in foreign_names(record.plan, record.names).items()}
    tensors = {}
    for theirs, name in ours.items():
        if theirs not in found:
            raise CheckpointError(f"{place} has no tensor {theirs}, which its layout needs.")
        tensor = found[theirs]
        if name.endswith(".query") and (tensor.ndim != 2 or tensor.shape[0] != 1):
            raise CheckpointError(
                f"{place}: {theirs} should be one row of a linear layer, [1, D], and has the shape "
                f"{list(tensor.shape)}."
            )
        tensors[name] = tensor.reshape(-1) if name.endswith(".query") else tensor
    return tensors, {name: tensor for name, tensor in found.items() if name not in ours}


def foreign_names(plan: ConversionPlan, names: str) -> dict[str, str]:
    """By our own names, theirs.

    Raises:
        ConfigError: the layout cannot be written in these names.
    """
    naming = NAMINGS[names]
    stream = _expressible(plan, naming)
    block_size(plan, names)
    foreign: dict[str, str] = {}
    for site in stream.sites:
        theirs = naming.pair(_site_path(stream, site, naming))
        for name, their_name in zip((site.query_name, site.gain_name), theirs, strict=True):
            if name is not None:
                foreign[name] = their_name
    return foreign


def block_size(plan: ConversionPlan, names: str) -> int:
    """The size of a block in the unit of these names.

    Raises:
        ConfigError: the blocks are not of one size, or not of whole layers.
    """
    naming = NAMINGS[names]
    stream = _expressible(plan, naming)
    lengths = [len(block) for block in stream.blocks]
    even = len(set(lengths[:-1] or lengths)) == 1 and lengths[-1] <= lengths[0]
    if not even:
        raise ConfigError(
            f"{naming.title} needs blocks of one size, the last one at most as long, and this "
            f"layout has {lengths} sublayers; convert with block_sublayers={lengths[0]}."
        )
    size = lengths[0]
    if naming.counts_layers and size % 2:
        raise ConfigError(
            f"{naming.title} counts whole layers of two sublayers, and this layout has blocks of "
            f"{size} sublayers; convert with block_sublayers={size + 1}."
        )
    return size // 2 if naming.counts_layers else size


def config_keys(record: Record) -> dict[str, Any]:
    """What config.json says in these names, beside our own entry."""
    if record.names == "native":
        return {}
    key = NAMINGS[record.names].block_key
    return {key: block_size(record.plan, record.names)}


def detect(names: Mapping[str, Any]) -> str | None:
    """Whose names a checkpoint uses: kimi, fla, or None."""
    for naming, each in NAMINGS.items():
        layers = [m for n in names if (m := each.pattern.fullmatch(n)) and m["layer"] is not None]
        if any(match["kind"] == each.attention for match in layers):
            return naming
    return None


def renamed_to(plan: ConversionPlan, names: str, found: Mapping[str, Any]) -> dict[str, str]:
    """By the names that `foreign_names` expects, those that a file has under another prefix.

    A K3 checkpoint says ``language_model.model.layers.0`` where a Llama says ``model.layers.0``.
    """
    pattern = NAMINGS[names].pattern
    stream = _expressible(plan, NAMINGS[names])
    home = stream.layers_path.removesuffix("layers")
    renamed = {}
    for name in found:
        match = pattern.fullmatch(name)
        if match is not None:
            renamed[home + name[len(match["prefix"]) :]] = name
    return renamed


def _expressible(plan: ConversionPlan, naming: Naming) -> PlannedStream:
    """The one stream of a plan that has the form of these names."""
    if plan.config.aggregate == "sum":
        raise ConfigError(
            f"{naming.title} models have the mean form, and this conversion is of the sum form, "
            'which their names cannot express; convert with aggregate="mean".'
        )
    if not plan.config.key_gain:
        raise ConfigError(
            f"{naming.title} models have a gain at every site; convert with key_gain=True."
        )
    if len(plan.streams) != 1:
        raise ConfigError(
            f"{naming.title} models have one residual stream, and this one has "
            f"{len(plan.streams)}; convert one of them with streams=(...)."
        )
    (stream,) = plan.streams
    left_out = next((site for site in stream.sites if site.left_out), None)
    if left_out is not None:
        raise ConfigError(
            f"{naming.title} models have a mix at every site, and this conversion leaves out "
            f"{left_out.name}; convert without sites=(...), or save it with native names."
        )
    if stream.deltas:
        raise ConfigError(
            f"{naming.title} models have block sums as sources, and stream {stream.name} has "
            "differences of states (delta_sources); save it with native names."
        )
    depths = [site.depth for site in stream.sites]
    regular = len(stream.sublayers) == 2 * stream.num_layers and depths == list(
        range(len(stream.sublayers) + 1)
    )
    if not regular or not re.fullmatch(r"(.+\.)?layers", stream.layers_path):
        raise ConfigError(
            f"{naming.title} names layers of attention and MLP under '...layers.N', which stream "
            f"{stream.name} does not have; save it with native names."
        )
    return stream


def _site_path(stream: PlannedStream, site: Site, naming: Naming) -> str:
    """The path that the names of a site's pair begin with."""
    if site.depth == len(stream.sublayers):
        return stream.layers_path.removesuffix("layers") + naming.output
    kind = naming.mlp if site.depth % 2 else naming.attention
    return f"{stream.sublayers[site.depth].layer}.{kind}"


def _first_pair(
    plan: ConversionPlan, naming: Naming, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The pair of the first read, which they have and nobody uses: as it is initialised."""
    (stream,) = plan.streams
    like = next(iter(tensors.values()))
    query, gain = naming.pair(_site_path(stream, stream.sites[0], naming))
    return {query: torch.zeros(1, stream.width, dtype=like.dtype), gain: torch.ones_like(like)}
