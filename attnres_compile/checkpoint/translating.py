"""A converted checkpoint in the names of another project, ours included."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from attnres_compile.checkpoint import names as naming
from attnres_compile.checkpoint import safetensors as st
from attnres_compile.checkpoint import saving
from attnres_compile.checkpoint.converting import Options
from attnres_compile.checkpoint.huggingface import open_directory
from attnres_compile.checkpoint.record import Record
from attnres_compile.checkpoint.sources import Source
from attnres_compile.config import AttnResConfig
from attnres_compile.errors import AlreadyConvertedError, ConfigError
from attnres_compile.plans import ConversionPlan


def translate(
    source: Source,
    output: Path,
    record: Record | None,
    foreign: str | None,
    config: AttnResConfig,
    options: Options,
) -> ConversionPlan:
    """The same converted model in the names of another project; this does read the weights."""
    has = record.names if record is not None else foreign
    if has == options.names:
        raise AlreadyConvertedError(
            f"{source.path.name} has Attention Residuals already (names: {has}); strip it first to "
            "convert it anew, or ask for other names by --names."
        )
    model = None if source.factory is None else source.factory()
    converted = saving.load(
        source.path,
        model,
        config=None if record is not None else _config(source, foreign, config),
        trust_remote_code=source.trust_remote_code,
    )
    saving.save(converted, output, names=options.names, overwrite=options.overwrite)  # type: ignore[arg-type]
    planned: ConversionPlan = converted.plan
    return planned


def foreign_names_in(source: Source) -> str | None:
    """Whose Attention Residuals a checkpoint has that is not ours."""
    if source.suffix == ".safetensors":
        return naming.detect(st.read_header(source.path).entries)
    if source.suffix == "":
        found = open_directory(source.path)
        return naming.detect({name: None for h in found.headers.values() for name in h.entries})
    return None


def _config(source: Source, foreign: str | None, config: AttnResConfig) -> AttnResConfig:
    """The options, with the block size and eps that a foreign config.json states."""
    assert foreign is not None
    settings: dict[str, Any] = {}
    if source.suffix == "":
        settings = open_directory(source.path, weights=False).config or {}
    each = naming.NAMINGS[foreign]
    size = settings.get(each.block_key)
    if isinstance(size, int) and size > 0 and config.block_sublayers is None:
        sublayers = 2 * size if each.counts_layers else size
        config = dataclasses.replace(config, num_blocks="auto", block_sublayers=sublayers)
    if config.block_sublayers is None and config.num_blocks == "auto":
        raise ConfigError(
            f"{source.path.name} has Attention Residuals in the names of {each.title}, and does "
            f"not say how long its blocks are ({each.block_key}); say it by --block-sublayers."
        )
    eps = settings.get("rms_norm_eps", settings.get("norm_eps", config.eps))
    return dataclasses.replace(config, aggregate="mean", eps=float(eps))
