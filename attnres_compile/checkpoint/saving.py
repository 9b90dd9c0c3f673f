"""`save` and `load`: a converted model into any format and back, bit for bit."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnres_compile.checkpoint import names as naming
from attnres_compile.checkpoint import pt, pt2
from attnres_compile.checkpoint.dressing import dress
from attnres_compile.checkpoint.filling import fill, stored_tensors
from attnres_compile.checkpoint.huggingface import is_directory_checkpoint, open_directory
from attnres_compile.checkpoint.matching import check_fits
from attnres_compile.checkpoint.onnx_extra import require
from attnres_compile.checkpoint.record import (
    KEY,
    NAMINGS,
    Record,
    check_finite,
    check_new_tensors,
    new_tensors,
    with_dtypes,
)
from attnres_compile.checkpoint.safetensors import (
    read_header,
    read_tensors,
    tied_names,
    write_tensors,
)
from attnres_compile.checkpoint.transformers_models import (
    check_shapes,
    model_on_meta,
    model_with,
    quiet,
)
from attnres_compile.checkpoint.writing import PARTIAL, new_directory, new_file, torch_file
from attnres_compile.config import AttnResConfig
from attnres_compile.conversion import convert, strip
from attnres_compile.errors import CheckpointError, ConfigError, InputError
from attnres_compile.inspection import attnres_parameters, unwrapped
from attnres_compile.module import is_converted
from attnres_compile.plans import ConversionPlan

Names = Literal["native", "kimi", "fla"]
EXTRAS = "attnres_extras"
"""Attribute of a converted model: tensors of its file that no site of ours uses."""


def save(
    converted: nn.Module,
    path: str | os.PathLike[str],
    *,
    names: Names = "native",
    new_only: bool = False,
    overwrite: bool = False,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Saves a converted model, whole or not at all.

    Args:
        converted: what `convert` or `load` returned.
        path: ``.safetensors``, ``.pt`` or ``.pth`` for one file, ``.pt2`` for an exported program,
            ``.onnx`` for a model of ONNX (every axis dynamic that can be), and anything else for a
            directory: as `save_pretrained` writes it, with the new parameters in a file of their
            own.
        names: whose parameter names to use for queries and gains: ours, ``"kimi"`` (Kimi K3), or
            ``"fla"`` (flash-linear-attention).
        new_only: save queries and gains only, a few kilobytes (``.safetensors`` or ``.pt``). They
            load into the model they were made for: ``load(path, model)``.
        overwrite: replace what is there.
        args, kwargs: example inputs, for ``.pt2`` and ``.onnx``; inferred where the model says.

    Raises:
        InputError: the model was not converted.
        ConfigError: the layout cannot be written in those names.
        OutputError: the path exists, or cannot be written.

    Example:
        >>> import attnres_compile, tempfile, torchvision
        >>> model = attnres_compile.convert(torchvision.models.vit_b_16())
        >>> path = tempfile.mkdtemp() + "/new.safetensors"
        >>> attnres_compile.save(model, path, new_only=True)
        >>> again = attnres_compile.load(path, torchvision.models.vit_b_16())
    """
    target, converted = Path(path), unwrapped(converted)
    if names not in NAMINGS:
        raise ConfigError(f"names must be one of {', '.join(NAMINGS)}, not {names!r}.")
    record, new = _described(converted, names)
    suffix = target.suffix.lower()
    if suffix == ".pt2":
        if names != "native" or new_only:
            raise ConfigError("a .pt2 program is saved whole and with native names.")
        pt2.save(converted, target, record, args, kwargs, overwrite=overwrite)
    elif suffix == ".onnx":
        if names != "native" or new_only:
            raise ConfigError("an ONNX model is saved whole and with native names.")
        require("onnx", "onnxscript", "onnx_ir")
        from attnres_compile.onnx_export import save_onnx

        save_onnx(converted, target, record, args, kwargs, overwrite=overwrite)
    elif suffix == ".safetensors":
        tensors = new if new_only else {**_base(converted), **new}
        with new_file(target, overwrite=overwrite) as file:
            write_tensors(file, tensors, {KEY: record.encode()})
    elif suffix in pt.SUFFIXES:
        tensors = new if new_only else {**_base(converted), **new}
        with new_file(target, overwrite=overwrite) as written, torch_file(written) as file:
            torch.save({"state_dict": tensors, KEY: record.encode()}, file)
    elif new_only:
        raise ConfigError("new parameters alone go into one file; name it .safetensors or .pt.")
    else:
        _save_directory(converted, target, record, new, overwrite)


def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    names: Names | None = None,
    config: AttnResConfig | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """Loads a converted model, ready to train or run.

    Args:
        path: what `save`, ``save_pretrained`` or ``attnres-compile convert`` wrote.
        model: for files without a config.json, the unconverted model: its parameters become those
            of the file, in the file's dtype and on the model's device. For a file of new
            parameters only, the model whose base weights to use.
        names: for files of Kimi K3 (``"kimi"``) or flash-linear-attention (``"fla"``) that this
            package did not write; recognised by their tensors if left out.
        config: for those, the options that the file does not tell; the block size above all.
        allow_pickle: dangerous: unpickle a whole module, which runs code from the file.
        trust_remote_code: dangerous: run the code that a directory brings along.

    Returns:
        The converted model; for a ``.pt2`` file the module of its program.

    Raises:
        CheckpointError: the file is damaged, or does not belong to the model; names the tensor or
            the site, what was expected and what was found.
        UnsafeFileError: opening the file would run code.
        InputError: the file needs `model`, or was not converted.

    Example:
        >>> import attnres_compile, tempfile, torchvision
        >>> model = attnres_compile.convert(torchvision.models.vit_b_16())
        >>> path = tempfile.mkdtemp() + "/model.pt"
        >>> attnres_compile.save(model, path)
        >>> again = attnres_compile.load(path, torchvision.models.vit_b_16())
        >>> len(again.plan.streams[0].sites)
        25
    """
    source = Path(path)
    check_readable(source)
    if source.suffix.lower() == ".pt2":
        return pt2.load(source)
    if source.suffix.lower() == ".onnx":
        raise InputError(
            f"{source.name} is run by ONNX Runtime and does not load into PyTorch; load the "
            "checkpoint that it was exported from."
        )
    if is_directory_checkpoint(source):
        return _load_directory(source, model, names, config, trust_remote_code)
    if source.suffix.lower() == ".safetensors":
        header = read_header(source)
        text = header.metadata.get(KEY)
        tensors = read_tensors(header)
        tensors.update({alias: tensors[kept] for alias, kept in tied_names(header).items()})
    else:
        loaded = pt.read_pickle(source) if allow_pickle else pt.read_file(source)
        if isinstance(loaded, nn.Module):
            return _pickled(loaded, source)
        tensors = dict(pt.state_dict_of(loaded, source))
        text = loaded.get(KEY)
    if model is None:
        raise InputError(
            f"{source.name} holds tensors and no model: pass the unconverted model, as in "
            f"load({source.name!r}, model), or --model package.module:factory in the shell."
        )
    record = _record(text, tensors, model, source.name, names, config)
    base, new, extras = _split(record, tensors, source.name)
    if base:
        fill(model, base, source.name)
    return attach(model, record.plan, new, extras, source.name)


def attach(
    model: nn.Module,
    plan: ConversionPlan,
    new: Mapping[str, Tensor],
    extras: Mapping[str, Tensor],
    place: str,
) -> nn.Module:
    """Converts a model by a saved plan and gives it the saved queries and gains.

    Raises:
        CheckpointError: they do not belong to the model; names the site.
    """
    shapes = {n: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in new.items()}
    check_new_tensors(plan, shapes, place)
    check_finite(new, place)
    check_fits(model, plan, place)
    converted = convert(model, plan=plan)
    parameters = attnres_parameters(converted)
    for name, tensor in new.items():
        parameters[name].data = tensor.detach().clone().to(parameters[name].device)
    if extras:
        converted.__dict__[EXTRAS] = {name: tensor.clone() for name, tensor in extras.items()}
    return converted


def check_readable(path: Path) -> None:
    """Refuses what is not there, and what an interrupted run left behind.

    Raises:
        CheckpointError: either.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist.")
    if any(part.endswith(PARTIAL) for part in path.absolute().parts):
        raise CheckpointError(f"{path} is what an interrupted run left; delete it and run again.")


def plain_model(converted: nn.Module) -> nn.Module:
    """`strip` without its warning: the queries are saved beside the plain model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return strip(converted)


def _described(converted: nn.Module, names: str) -> tuple[Record, dict[str, Tensor]]:
    """The record of a converted model, and its new tensors under the names of a file."""
    plan = vars(converted).get("plan")
    if not isinstance(plan, ConversionPlan):
        raise InputError(
            f"{type(converted).__name__} carries no conversion plan; pass the whole model that "
            "attnres_compile.convert(model) returned."
        )
    parameters = attnres_parameters(converted)
    tensors = {name: parameters[name].detach() for name in new_tensors(plan)}
    extras: dict[str, Tensor] = vars(converted).get(EXTRAS, {})
    record = Record(with_dtypes(plan, tensors), names, tuple(extras))
    return record, naming.to_file(record, tensors, extras)


def _base(converted: nn.Module) -> dict[str, Tensor]:
    if not is_converted(converted):
        raise InputError(
            f"{type(converted).__name__} is a converted graph, not a model; save its new "
            "parameters alone, by new_only=True, or export it."
        )
    return stored_tensors(plain_model(converted))


def _save_directory(
    converted: nn.Module, target: Path, record: Record, new: dict[str, Tensor], overwrite: bool
) -> None:
    plain: Any = plain_model(converted)
    with new_directory(target, overwrite=overwrite) as folder:
        if hasattr(plain, "save_pretrained"):
            with quiet():
                plain.save_pretrained(folder)
        else:
            write_tensors(folder / "model.safetensors", stored_tensors(plain), {})
        dress(folder, open_directory(folder), record, new)


def _load_directory(
    source: Path,
    model: nn.Module | None,
    names: str | None,
    config: AttnResConfig | None,
    trust: bool,
) -> nn.Module:
    found = open_directory(source)
    if model is None and found.config is None:
        raise InputError(
            f"{source.name} has no config.json that names its model; pass the unconverted model."
        )
    remote = found.path if trust else None
    header = found.new_weights()
    tensors = found.tensors()
    for each in found.headers.values():
        tensors.update({alias: tensors[kept] for alias, kept in tied_names(each).items()})
    if model is None and found.config is not None:
        empty = model_on_meta(found.config, found.place, trust=remote)
    else:
        assert model is not None
        empty = model
    record = found.record() or _record(None, tensors, empty, source.name, names, config)
    place = source.name if header is None else f"{source.name}/{header.path.name}"
    if header is not None:
        base, (_, new, extras) = tensors, _split(record, read_tensors(header), place)
    else:
        base, new, extras = _split(record, tensors, place)
    if model is not None:
        fill(model, base, source.name)
        return attach(model, record.plan, new, extras, place)
    assert found.config is not None
    shapes = {n: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in base.items()}
    check_shapes(empty, shapes, source.name)
    loaded = model_with(found.config, base, source.name, trust=remote)
    return attach(loaded, record.plan, new, extras, place)


def _record(
    text: object,
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    place: str,
    names: str | None,
    config: AttnResConfig | None,
) -> Record:
    """What a file says of its layout, or what its names and the options tell of it."""
    if isinstance(text, str):
        return Record.decode(text, place)
    names = names or naming.detect(tensors)
    if names is None or names == "native":
        raise InputError(
            f"{place} has no Attention Residuals of attnres_compile; convert it first, by "
            "attnres_compile.convert(model) or 'attnres-compile convert'."
        )
    if config is None:
        raise ConfigError(
            f"{place} has Attention Residuals in the names of {naming.NAMINGS[names].title}, and "
            "does not say how long its blocks are; pass config=AttnResConfig(aggregate='mean', "
            "block_sublayers=..., eps=...)."
        )
    from attnres_compile.planning import plan as make_plan

    planned = make_plan(model, config=config)
    planned.require_streams()
    return Record(planned, names)


def _split(
    record: Record, tensors: Mapping[str, Tensor], place: str
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the model itself, queries and gains, and what belongs to neither."""
    if record.names == "native":
        mine = {n: t for n, t in tensors.items() if _is_new(n, record)}
    else:
        pattern = naming.NAMINGS[record.names].pattern
        mine = {n: t for n, t in tensors.items() if pattern.fullmatch(n)}
    base = {name: tensor for name, tensor in tensors.items() if name not in mine}
    if record.names != "native":
        moved = naming.renamed_to(record.plan, record.names, mine)
        mine = {expected: mine[name] for expected, name in moved.items()}
    new, extras = naming.from_file(record, mine, place)
    return base, new, extras


def _is_new(name: str, record: Record) -> bool:
    """Also a name that the layout does not know, so that it can be reported as such."""
    owners = {stream.owner for stream in record.plan.streams}
    prefixes = tuple(f"{owner}.attnres." if owner else "attnres." for owner in owners)
    return name in record.extras or name.startswith(prefixes)


def _pickled(loaded: nn.Module, source: Path) -> nn.Module:
    if not is_converted(loaded):
        raise InputError(f"{source.name} holds a {type(loaded).__name__} that was not converted.")
    return loaded
