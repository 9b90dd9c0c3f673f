"""A checkpoint to a converted one and back, from file to file.

Directories and ``.safetensors`` files are converted without reading a weight: the model is built on
the meta device and planned there, and only the new parameters are made.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attnres_compile.call_shapes import describe_call
from attnres_compile.checkpoint import dressing, pt, pt2, saving
from attnres_compile.checkpoint import names as naming
from attnres_compile.checkpoint import safetensors as st
from attnres_compile.checkpoint.huggingface import (
    open_directory,
)
from attnres_compile.checkpoint.onnx_extra import onnx_files
from attnres_compile.checkpoint.record import KEY, Record, initial_tensors
from attnres_compile.checkpoint.sources import (
    Source,
    empty_model,
    record_of,
    shapes_of,
    unpickled,
)
from attnres_compile.checkpoint.transformers_models import check_shapes
from attnres_compile.checkpoint.writing import (
    Advance,
    check_apart,
    check_space,
    ignore,
    new_directory,
    new_file,
    torch_file,
)
from attnres_compile.config import AttnResConfig
from attnres_compile.errors import AlreadyConvertedError, ConfigError
from attnres_compile.plans import ConversionPlan

logger = logging.getLogger(__name__)

FORMATS = (".safetensors", ".pt", ".pth", ".bin", ".pt2", ".onnx")


@dataclass(frozen=True)
class Options:
    """How to write an output.

    Attributes:
        names: whose parameter names to use.
        overwrite: replace what is there.
        copy: copy weights where they could be linked.
        hashed: record the SHA-256 of the original files now.
        inline: of ONNX models: no functions.
        advance: is told of bytes as they are written and hashed.
    """

    names: str = "native"
    overwrite: bool = False
    copy: bool = False
    hashed: bool = True
    inline: bool = False
    advance: Advance = ignore


def plan_source(source: Source, config: AttnResConfig) -> ConversionPlan:
    """The plan for a checkpoint, or for a config with no weights at all."""
    from attnres_compile.planning import plan

    saving.check_readable(source.path)
    if source.suffix == ".pt2":
        return pt2.plan_file(source.path, config)
    if source.suffix == ".onnx":
        planned: ConversionPlan = onnx_files().plan_file(source.path, config, shapes_of(source))
        return planned
    if source.suffix == "" and open_directory(source.path, weights=False).marked:
        raise AlreadyConvertedError(
            f"{source.path.name} has Attention Residuals already; 'inspect' shows them."
        )
    if source.suffix in (".pt", ".pth") and source.factory is None and source.allow_pickle:
        return plan(unpickled(source), *(source.call or ()), config=config)
    return _plan(source, empty_model(source), config)


def convert_source(
    source: Source, output: Path, config: AttnResConfig, options: Options
) -> ConversionPlan:
    """Converts a checkpoint into another of the same format.

    A checkpoint that has Attention Residuals already is written anew in other names, if `options`
    ask for others than it has.

    Raises:
        AttnResError: with a sentence that names the file and what is wrong with it.
    """
    saving.check_readable(source.path)
    check_output(source, output, options)
    if source.suffix == ".onnx":
        return _convert_onnx(source, output, config, options)
    if options.inline:
        raise ConfigError("only ONNX models have functions to put inline.")
    from attnres_compile.checkpoint import translating

    record = record_of(source)
    foreign = translating.foreign_names_in(source)
    if record is not None or foreign is not None:
        return translating.translate(source, output, record, foreign, config, options)
    if source.suffix == ".pt2":
        if options.names != "native":
            raise ConfigError("a .pt2 program keeps the names of its parameters: native.")
        return pt2.convert_file(source.path, output, config, overwrite=options.overwrite)
    if source.suffix in (".pt", ".pth") and source.factory is None and source.allow_pickle:
        return _convert_pickled(source, output, config, options)
    model = empty_model(source)
    if source.suffix == "":
        return _convert_directory(source, model, output, config, options)
    if source.suffix == ".safetensors":
        return _convert_safetensors(source, model, output, config, options)
    return _convert_pt(source, model, output, config, options)


def needed_space(source: Source, options: Options, output: Path | None = None) -> int:
    """Bytes that a conversion writes, without the new parameters."""
    if source.suffix == ".onnx":
        return source.path.stat().st_size + int(onnx_files().external_size(source.path, output))
    if source.suffix != "":
        return source.path.stat().st_size
    folder = source.path.parent if source.path.is_file() else source.path
    found = open_directory(folder)
    weights = {*found.headers, *found.pickles}
    sizes = {name: (folder / name).stat().st_size for name in dressing.files_in(folder)}
    return sum(size for name, size in sizes.items() if options.copy or name not in weights)


def work_of(source: Source, options: Options) -> int:
    """Bytes that a conversion tells its progress of: those it writes and those it hashes."""
    if source.suffix == ".onnx":
        return int(onnx_files().external_size(source.path))
    if source.suffix != "":
        return source.path.stat().st_size * (2 if options.hashed else 1)
    folder = source.path.parent if source.path.is_file() else source.path
    total = sum((folder / name).stat().st_size for name in dressing.files_in(folder))
    return total * (2 if options.hashed else 1)


def _plan(source: Source, model: nn.Module, config: AttnResConfig) -> ConversionPlan:
    from attnres_compile.planning import plan

    if source.call is None:
        return plan(model, config=config)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    args, kwargs = pytree.tree_map_only(Tensor, lambda leaf: leaf.to(device), source.call)
    planned = plan(model, args, kwargs, config=config)
    # described before they went to the meta device, where they have no values
    return dataclasses.replace(planned, inputs=describe_call(*source.call))


def _convert_directory(
    source: Source, model: nn.Module, output: Path, config: AttnResConfig, options: Options
) -> ConversionPlan:
    plain = dressing.open_plain(source.path)
    check_shapes(model, plain.shapes(), plain.path.name)
    planned = _plan(source, model, config)
    planned.require_streams()
    record, new = _new(planned, options)
    check_space(output, needed_space(source, options))
    with new_directory(output, overwrite=options.overwrite) as folder:
        files = dressing.files_in(plain.path)
        dressing.copy_files(plain.path, folder, files, copy=options.copy, advance=options.advance)
        dressing.dress(folder, plain, record, new, hashed=options.hashed, advance=options.advance)
    return planned


def _convert_safetensors(
    source: Source, model: nn.Module, output: Path, config: AttnResConfig, options: Options
) -> ConversionPlan:
    header = st.read_header(source.path)
    tied = st.tied_names(header)
    shapes = header.shapes()
    check_shapes(model, {**shapes, **{a: shapes[k] for a, k in tied.items()}}, source.path.name)
    planned = _plan(source, model, config)
    planned.require_streams()
    record, new = _new(planned, options)
    check_space(output, needed_space(source, options))
    with new_file(output, overwrite=options.overwrite) as file:
        st.append_tensors(
            header,
            file,
            new,
            {KEY: record.encode()},
            hashed=options.hashed,
            advance=options.advance,
        )
    return planned


def _convert_pt(
    source: Source, model: nn.Module, output: Path, config: AttnResConfig, options: Options
) -> ConversionPlan:
    loaded = pt.read_file(source.path)
    tensors = pt.state_dict_of(loaded, source.path)
    check_shapes(model, pt.shapes_of(tensors), source.path.name)
    planned = _plan(source, model, config)
    planned.require_streams()
    record, new = _new(planned, options)
    check_space(output, needed_space(source, options))
    pt.write_converted(
        loaded, source.path, output, new, record.encode(), overwrite=options.overwrite
    )
    return planned


def _convert_pickled(
    source: Source, output: Path, config: AttnResConfig, options: Options
) -> ConversionPlan:
    from attnres_compile.conversion import convert

    if options.names != "native":
        raise ConfigError("a pickled module keeps the names of its parameters: native.")
    model = unpickled(source)
    converted = convert(model, *(source.call or ()), config=config)
    with new_file(output, overwrite=options.overwrite) as written, torch_file(written) as file:
        torch.save(converted, file)
    planned: Any = converted.plan
    assert isinstance(planned, ConversionPlan)
    return planned


def _convert_onnx(
    source: Source, output: Path, config: AttnResConfig, options: Options
) -> ConversionPlan:
    if options.names != "native":
        raise ConfigError("an ONNX model keeps the names of its parameters: native.")
    if source.factory is not None:
        raise ConfigError("an ONNX model needs no --model; it says itself what it computes.")
    if options.copy and output.absolute().parent == source.path.absolute().parent:
        raise ConfigError("--copy: name an output in another directory; here weights are shared.")
    planned: ConversionPlan = onnx_files().convert_file(
        source.path,
        output,
        config,
        shapes_of(source),
        inline=options.inline,
        overwrite=options.overwrite,
        advance=options.advance,
    )
    return planned


def _new(planned: ConversionPlan, options: Options) -> tuple[Record, dict[str, Tensor]]:
    record = Record(planned, options.names)
    return record, naming.to_file(record, initial_tensors(planned), {})


def check_output(source: Source, output: Path, options: Options) -> None:
    """Refuses an output of another kind, one that exists, and one that overlaps with the input."""
    check_apart(source.path.parent if source.path.name == "config.json" else source.path, output)
    suffix = output.suffix.lower() if output.suffix.lower() in FORMATS else ""
    if suffix != source.suffix:
        wanted = f"a {source.suffix} file" if source.suffix else "a directory"
        raise ConfigError(f"{source.path.name} converts to {wanted}, and {output.name} is none.")
    if output.exists() and not options.overwrite:
        from attnres_compile.errors import OutputExistsError

        raise OutputExistsError(
            f"{output} exists already; name another output, or say --overwrite."
        )
