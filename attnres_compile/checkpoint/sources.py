"""A checkpoint as it was given, and what is read of it: its model, its tensors, its record."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnres_compile.checkpoint import pt, pt2, saving
from attnres_compile.checkpoint import safetensors as st
from attnres_compile.checkpoint.filling import fill
from attnres_compile.checkpoint.huggingface import (
    Directory,
    is_directory_checkpoint,
    open_directory,
)
from attnres_compile.checkpoint.onnx_extra import onnx_files
from attnres_compile.checkpoint.record import KEY, Record
from attnres_compile.checkpoint.transformers_models import model_on_meta
from attnres_compile.errors import InputError
from attnres_compile.plans import ConversionPlan

logger = logging.getLogger(__name__)

Factory = Callable[[], nn.Module]
Call = tuple[tuple[Any, ...], dict[str, Any]]


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
        return unpickled(source)
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


def shapes_of(source: Source) -> dict[str, tuple[int, ...]]:
    """The shapes of the inputs that were given by name, for an ONNX model.

    Raises:
        InputError: they were given by position, or are no tensors.
    """
    args, kwargs = source.call or ((), {})
    if args or not all(isinstance(value, Tensor) for value in kwargs.values()):
        raise InputError("the inputs of an ONNX model have names: say NAME=SHAPE.")
    return {name: tuple(value.shape) for name, value in kwargs.items()}


def unpickled(source: Source) -> nn.Module:
    loaded = pt.read_pickle(source.path)
    if not isinstance(loaded, nn.Module):
        raise InputError(
            f"{source.path.name} holds a {type(loaded).__name__}, no module; say which model its "
            "tensors belong to by --model package.module:factory."
        )
    return loaded


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
