"""``.pt2``: programs of torch.export, converted as graphs.

The archive of a converted program holds, as an extra file, the program as it was (its graph, no
weights), so that stripping gives the same graph and the same weights again.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnres_compile.checkpoint.pt2_safety import check_archive
from attnres_compile.checkpoint.record import KEY, Record, new_tensors
from attnres_compile.checkpoint.writing import new_file, torch_file
from attnres_compile.config import AttnResConfig
from attnres_compile.errors import AlreadyConvertedError, CheckpointError, InputError, in_words
from attnres_compile.plans import ConversionPlan

RECORD = f"{KEY}.json"
ORIGINAL = f"{KEY}_original.json"
_PROGRAM = re.compile(r"[^/]+/models/[^/]+\.json")


def read_program(path: Path) -> torch.export.ExportedProgram:
    """Reads a program, after a look through the archive for what would run code.

    Raises:
        CheckpointError, UnsafeFileError: see `check_archive`.
    """
    # registers attnres::mix, which a converted program calls
    from attnres_compile.kernels import ops  # noqa: F401

    check_archive(path)
    try:
        return torch.export.load(path)
    except Exception as error:  # damaged archives fail in every way
        raise CheckpointError(f"{path.name} is damaged: {in_words(error)}") from error


def read_record(path: Path) -> Record | None:
    """The layout of a converted program; None for a plain one."""
    check_archive(path)
    text = _extra(path, RECORD)
    return None if text is None else Record.decode(text, path.name)


def load(path: Path) -> nn.Module:
    """The module of a converted program, with its plan.

    Raises:
        InputError: the program was not converted.
        CheckpointError: its parameters are not those of its layout.
    """
    from attnres_compile.checkpoint.record import check_finite, check_new_tensors

    record = read_record(path)
    if record is None:
        raise InputError(f"{path.name} has no Attention Residuals; convert it first.")
    module: nn.Module = read_program(path).module()
    found = dict(module.named_parameters())
    new = {name: found[name].detach() for name in new_tensors(record.plan) if name in found}
    shapes = {n: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in new.items()}
    check_new_tensors(record.plan, shapes, path.name)
    check_finite(new, path.name)
    module.__dict__["plan"] = record.plan
    return module


def save(
    converted: nn.Module,
    path: Path,
    record: Record,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    *,
    overwrite: bool,
) -> None:
    """Exports a converted model into a file."""
    from attnres_compile.exporting import export

    program = export(converted, args, kwargs)
    with new_file(path, overwrite=overwrite) as written, torch_file(written) as file:
        torch.export.save(program, file, extra_files={RECORD: record.encode()})


def convert_file(
    source: Path, target: Path, config: AttnResConfig, *, overwrite: bool
) -> ConversionPlan:
    """Converts a program into another file.

    Raises:
        AlreadyConvertedError: it has Attention Residuals already.
    """
    from attnres_compile.conversion import convert

    if read_record(source) is not None:
        raise AlreadyConvertedError(f"{source.name} has Attention Residuals already; strip it.")
    converted: Any = convert(read_program(source), config=config)  # type: ignore[type-var]
    plan: ConversionPlan = vars(converted.graph_module)["plan"]
    extra = {RECORD: Record(plan).encode(), ORIGINAL: _program(source)}
    with new_file(target, overwrite=overwrite) as written, torch_file(written) as file:
        torch.export.save(converted, file, extra_files=extra)
    return plan


def plan_file(source: Path, config: AttnResConfig) -> ConversionPlan:
    """What `convert_file` would do."""
    from attnres_compile.planning import plan

    return plan(read_program(source), config=config)


def strip_file(source: Path, target: Path, *, overwrite: bool) -> None:
    """Writes the program that was converted, with the base weights of the converted one.

    Raises:
        InputError: the file does not hold the program as it was.
    """
    record, original = read_record(source), _extra(source, ORIGINAL)
    if record is None:
        raise InputError(f"{source.name} has no Attention Residuals; there is nothing to strip.")
    if original is None:
        raise InputError(
            f"{source.name} was exported from a converted model and does not hold the plain "
            "program; strip the model by attnres_compile.strip and export that."
        )
    with new_file(target, overwrite=overwrite) as file:
        _write_without(source, file, original, set(new_tensors(record.plan)))
        check_archive(file)


def _program(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if _PROGRAM.fullmatch(name)]
        if len(names) != 1:
            raise CheckpointError(f"{path.name} holds {len(names)} programs, not one.")
        return archive.read(names[0]).decode()


def _extra(path: Path, name: str) -> str | None:
    with zipfile.ZipFile(path) as archive:
        found = [n for n in archive.namelist() if n.partition("/")[2] == f"extra/{name}"]
        return archive.read(found[0]).decode() if found else None


def _write_without(source: Path, target: Path, program: str, dropped: set[str]) -> None:
    """The archive with another program, without some weights and without extra files."""
    with zipfile.ZipFile(source) as reading, zipfile.ZipFile(target, "w") as writing:
        skipped: set[str] = set()
        replaced: dict[str, bytes] = {}
        for name in reading.namelist():
            if re.fullmatch(r"[^/]+/data/weights/[^/]+_config\.json", name):
                weights = json.loads(reading.read(name))
                gone = [weights["config"].pop(each) for each in dropped]
                skipped |= {name.rpartition("/")[0] + "/" + each["path_name"] for each in gone}
                replaced[name] = json.dumps(weights).encode()
            if _PROGRAM.fullmatch(name):
                replaced[name] = program.encode()
        for member in reading.infolist():
            extra = member.filename.partition("/")[2].startswith("extra/")
            if not extra and member.filename not in skipped:
                content = replaced.get(member.filename) or reading.read(member)
                writing.writestr(member.filename, content)
