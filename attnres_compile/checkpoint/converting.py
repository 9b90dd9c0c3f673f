"""A checkpoint to a converted one and back, from file to file.

Directories and ``.safetensors`` files are converted without reading a weight: the model is built on
the meta device and planned there, and only the new parameters are made.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
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
from attnres_compile.checkpoint.filling import fill
from attnres_compile.checkpoint.huggingface import (
    Directory,
    is_directory_checkpoint,
    open_directory,
)
from attnres_compile.checkpoint.onnx_extra import onnx_files
from attnres_compile.checkpoint.record import KEY, Record, initial_tensors
from attnres_compile.checkpoint.transformers_models import check_shapes, model_on_meta
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
from attnres_compile.errors import AlreadyConvertedError, ConfigError, InputError
from attnres_compile.plans import ConversionPlan

logger = logging.getLogger(__name__)

Factory = Callable[[], nn.Module]
Call = tuple[tuple[Any, ...], dict[str, Any]]
FORMATS = (".safetensors", ".pt", ".pth", ".bin", ".pt2", ".onnx")


@dataclass(frozen=True)
class Source:
    """A checkpoint and how to get a model for it.

    Attributes:
        path: of the checkpoint.
        factory: makes the model of a checkpoint that does not say what it is.
        call: inputs to capture it with; inferred where the model says what it takes.
        allow_pickle, trust_remote_code: dangerous, see `load`.
    """

    path: Path
    factory: Factory | None = None
    call: Call | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False

    @property
    def suffix(self) -> str:
        """``.pt`` and so on; empty for a directory."""
        return "" if is_directory_checkpoint(self.path) else self.path.suffix.lower()


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
        return plan(_unpickled(source), *(source.call or ()), config=config)
    return _plan(source, empty_model(source), config)


def empty_model(source: Source) -> nn.Module:
    """The model of a checkpoint, without its weights; on the meta device wherever that can be.

    Raises:
        InputError: a factory is needed.
    """
    if source.factory is not None:
        return _on_meta(source.factory)
    if source.suffix == "":
        found = open_directory(source.path, weights=False)
        if found.config is not None:
            remote = found.path if source.trust_remote_code else None
            return model_on_meta(_with_dtype(source, found), found.place, trust=remote)
    raise InputError(
        f"{source.path.name} holds tensors and no model: say which one by --model "
        "package.module:factory (and --model-args for its arguments)."
    )


def real_model(source: Source) -> nn.Module:
    """A model with memory for its weights, for a checkpoint that needs a factory.

    Raises:
        InputError: there is no factory.
    """
    if source.factory is None:
        raise InputError(
            f"{source.path.name} holds tensors and no model: say which one by --model "
            "package.module:factory (and --model-args for its arguments)."
        )
    return source.factory()


def load_source(source: Source) -> nn.Module:
    """The converted model of a checkpoint."""
    model = None if source.factory is None else source.factory()
    loaded: nn.Module = saving.load(
        source.path,
        model,
        allow_pickle=source.allow_pickle,
        trust_remote_code=source.trust_remote_code,
    )
    return loaded


def load_plain(source: Source) -> nn.Module:
    """The model of a checkpoint that was never converted."""
    if source.suffix == ".pt2":
        program: nn.Module = pt2.read_program(source.path).module()
        return program
    if source.suffix in (".pt", ".pth") and source.factory is None and source.allow_pickle:
        return _unpickled(source)
    if source.suffix == "" and source.factory is None:
        found = open_directory(source.path)
        if found.config is not None:
            from attnres_compile.checkpoint.transformers_models import model_with

            remote = found.path if source.trust_remote_code else None
            return model_with(found.config, found.tensors(), source.path.name, trust=remote)
    model = real_model(source)
    fill(model, tensors_of(source), source.path.name)
    return model


def tensors_of(source: Source) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name."""
    if source.suffix == "":
        return open_directory(source.path).tensors()
    if source.suffix == ".safetensors":
        header = st.read_header(source.path)
        tensors = st.read_tensors(header)
        tied = st.tied_names(header)
        return {**tensors, **{alias: tensors[kept] for alias, kept in tied.items()}}
    return pt.read_state_dict(source.path)


def record_of(source: Source) -> Record | None:
    """The layout of a checkpoint; None for one that was never converted."""
    if source.suffix == "":
        return open_directory(source.path).record()
    if source.suffix == ".pt2":
        return pt2.read_record(source.path)
    if source.suffix == ".onnx":
        record: Record | None = onnx_files().read_record(source.path)
        return record
    if source.suffix == ".safetensors":
        text: Any = st.read_header(source.path).metadata.get(KEY)
    else:
        loaded = pt.read_pickle(source.path) if source.allow_pickle else pt.read_file(source.path)
        if isinstance(loaded, nn.Module):
            plan = vars(loaded).get("plan")
            return Record(plan) if isinstance(plan, ConversionPlan) else None
        pt.state_dict_of(loaded, source.path)
        text = loaded.get(KEY)
    return Record.decode(text, source.path.name) if isinstance(text, str) else None


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
    model = _unpickled(source)
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


def shapes_of(source: Source) -> dict[str, tuple[int, ...]]:
    """The shapes of the inputs that were given by name, for an ONNX model.

    Raises:
        InputError: they were given by position, or are no tensors.
    """
    args, kwargs = source.call or ((), {})
    if args or not all(isinstance(value, Tensor) for value in kwargs.values()):
        raise InputError("the inputs of an ONNX model have names: say NAME=SHAPE.")
    return {name: tuple(value.shape) for name, value in kwargs.items()}


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


def _on_meta(factory: Factory) -> nn.Module:
    """A model without memory for weights; a factory that computes with them is run as it is."""
    try:
        with torch.device("meta"):
            return factory()
    except (NotImplementedError, RuntimeError) as error:
        logger.info("the model is built in memory: %s", str(error).splitlines()[0])
        return factory()


def _with_dtype(source: Source, found: Directory) -> dict[str, Any]:
    """The config, with the dtype of the weights where it does not say one."""
    config = dict(found.config or {})
    if config.get("dtype") or config.get("torch_dtype"):
        return config
    if source.path.name == "config.json" or not _has_weights(found):
        return config
    headers = open_directory(source.path).headers.values()
    dtypes = [e.dtype for header in headers for e in header.entries.values()]
    floating = [dtype for dtype in dtypes if dtype in ("float32", "bfloat16", "float16", "float64")]
    if floating:
        config["dtype"] = max(set(floating), key=floating.count)
    return config


def _has_weights(found: Directory) -> bool:
    return any(found.path.glob("*.safetensors")) or any(found.path.glob("*.safetensors.index.json"))


def _unpickled(source: Source) -> nn.Module:
    loaded = pt.read_pickle(source.path)
    if not isinstance(loaded, nn.Module):
        raise InputError(
            f"{source.path.name} holds a {type(loaded).__name__}, no module; say which model its "
            "tensors belong to by --model package.module:factory."
        )
    return loaded
