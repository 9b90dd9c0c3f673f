"""A Hugging Face directory: config.json, weights in one file or in shards, and whatever else.

A converted directory is the original with one more file of weights. What has to change (config,
index, model card) stands in its original form under ``attnres_original/``, beside the hashes of all
files, so that stripping gives the original back bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from attnres_compile.checkpoint import pt
from attnres_compile.checkpoint.record import KEY, Record, parse_json
from attnres_compile.checkpoint.safetensors import Header, read_header, read_tensors
from attnres_compile.errors import CheckpointError, UnsafeFileError
from attnres_compile.huggingface import ENTRY, SAVED_MODEL_TYPE, unmarked

NEW_WEIGHTS = "attnres.safetensors"
ORIGINALS = "attnres_original"
CONFIG = "config.json"
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_LARGEST_JSON = 50_000_000  # bytes; indexes of the largest models have a few million


@dataclass(frozen=True)
class Directory:
    """What a directory holds, with every header checked and no weight read.

    Attributes:
        path: of the directory.
        config: what config.json says, without our mark; None where there is none.
        marked: whether it had our mark.
        entry: what config.json says of a conversion.
        headers: the safetensors files of the weights by name, without `NEW_WEIGHTS`.
        pickles: the ``.bin`` files of the weights, by name.
        weight_map: by tensor, the file that holds it, as the index says; empty without an index.
        index: name of the index file, if there is one.
    """

    path: Path
    config: dict[str, Any] | None
    marked: bool
    entry: Mapping[str, Any] | None
    headers: dict[str, Header]
    pickles: tuple[str, ...]
    weight_map: dict[str, str]
    index: str | None

    @property
    def place(self) -> str:
        """For messages on the config."""
        return f"{self.path.name}/{CONFIG}"

    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of every tensor of the weights."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for header in self.headers.values():
            found.update(header.shapes())
        for name in self.pickles:
            found.update(pt.shapes_in(self.path / name))
        return found

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the weights, mapped from the disk."""
        found: dict[str, Tensor] = {}
        for header in self.headers.values():
            found.update(read_tensors(header))
        for name in self.pickles:
            found.update(pt.read_state_dict(self.path / name))
        return found

    def new_weights(self) -> Header | None:
        """The header of the file with the new parameters."""
        path = self.path / NEW_WEIGHTS
        return read_header(checked_file(self.path, NEW_WEIGHTS)) if path.exists() else None

    def record(self) -> Record | None:
        """The layout of the new parameters; None for a directory that was never converted."""
        header = self.new_weights()
        if header is not None:
            place = f"{self.path.name}/{NEW_WEIGHTS}"
            if KEY not in header.metadata:
                raise CheckpointError(f"{place} does not say how it is laid out.")
            return Record.decode(header.metadata[KEY], place)
        if self.entry is not None:
            text = self.entry.get("record")
            if not isinstance(text, str):
                raise CheckpointError(f"{self.place}: its entry {ENTRY!r} holds no record.")
            return Record.decode(text, self.place)
        if self.marked:
            raise CheckpointError(
                f"{self.place} is marked as converted, but {NEW_WEIGHTS} is missing."
            )
        return None


def is_directory_checkpoint(path: Path) -> bool:
    """Whether a path is a directory, or the config.json of one."""
    return path.is_dir() or path.name == CONFIG


def open_directory(path: Path, *, weights: bool = True) -> Directory:
    """Reads what a directory says of itself; checks the headers of its weights.

    Args:
        path: the directory, or its config.json.
        weights: False for a config alone.

    Raises:
        CheckpointError: something is missing or damaged; names the file.
        UnsafeFileError: a file name leads out of the directory.
    """
    path = path.parent if path.name == CONFIG else path
    saved = _read_config(path)
    config = None if saved is None else unmarked(saved)
    is_marked = saved is not None and saved.get("model_type") == SAVED_MODEL_TYPE
    entry = None if saved is None else saved.get(ENTRY)
    if entry is not None and not isinstance(entry, dict):
        raise CheckpointError(f"{path.name}/{CONFIG}: its entry {ENTRY!r} is no object.")
    weight_map, index = _read_index(path) if weights else ({}, None)
    files = sorted({*weight_map.values()} - {NEW_WEIGHTS}) or _single_files(path)
    if weights and not files:
        raise CheckpointError(f"{path.name} holds no weights: no model.safetensors and no index.")
    files = files if weights else []
    checked = {name: checked_file(path, name) for name in files}
    headers = {n: read_header(p) for n, p in checked.items() if p.suffix == ".safetensors"}
    found = Directory(
        path=path,
        config=config,
        marked=is_marked,
        entry=entry,
        headers=headers,
        pickles=tuple(name for name in files if name not in headers),
        weight_map=weight_map,
        index=index,
    )
    _check_index(found)
    return found


def checked_file(directory: Path, name: str) -> Path:
    """The path of a file that a checkpoint names, if it really lies in that directory.

    Links are followed only where the hub's cache makes them: into the ``blobs`` beside snapshots.

    Raises:
        UnsafeFileError: the name, or a link, leads elsewhere.
        CheckpointError: there is no such file.
    """
    plain = PurePosixPath(name)
    outside = plain.is_absolute() or ".." in plain.parts or "\\" in name or "\0" in name
    if outside or len(plain.parts) != 1:
        raise UnsafeFileError(
            f"{directory.name} names the file {name!r}, which leads out of it; nothing was opened."
        )
    path = directory / name
    if not path.exists():
        raise CheckpointError(f"{directory.name} names the file {name}, which is not there.")
    check_link(directory, path)
    if not path.is_file():
        raise CheckpointError(f"{directory.name}/{name} is no file.")
    return path


def check_link(directory: Path, path: Path) -> None:
    """Refuses a link that leads out of a directory.

    Raises:
        UnsafeFileError: it does.
    """
    target, home = path.resolve(), directory.resolve()
    in_cache = target.parent.name == "blobs" and target.parent == home.parent.parent / "blobs"
    if not target.is_relative_to(home) and not in_cache:
        raise UnsafeFileError(
            f"{directory.name}/{path.name} is a link to a file outside of the directory; replace "
            "it by the file if you trust it."
        )


def read_json_file(path: Path, what: str) -> Any:
    """A JSON file of a size that one may read.

    Raises:
        CheckpointError: too large, or no JSON.
    """
    if path.stat().st_size > _LARGEST_JSON:
        raise CheckpointError(f"{what} has {path.stat().st_size} bytes; that is no JSON to read.")
    return parse_json(path.read_bytes(), what)


def _read_config(path: Path) -> dict[str, Any] | None:
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist.")
    if not (path / CONFIG).exists():
        return None
    what = f"{path.name}/{CONFIG}"
    saved = read_json_file(checked_file(path, CONFIG), what)
    if not isinstance(saved, dict):
        raise CheckpointError(f"{what} is no JSON object.")
    return saved


def _read_index(path: Path) -> tuple[dict[str, str], str | None]:
    for single in _SINGLE:
        name = f"{single}.index.json"
        if not (path / name).exists():
            continue
        what = f"{path.name}/{name}"
        data = read_json_file(checked_file(path, name), what)
        weight_map = data.get("weight_map") if isinstance(data, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{what} has no weight_map.")
        if not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{what}: its weight_map names something that is no file.")
        return weight_map, name
    return {}, None


def _single_files(path: Path) -> list[str]:
    return next(([name] for name in _SINGLE if (path / name).exists()), [])


def _check_index(directory: Directory) -> None:
    """Every tensor of the index is where the index says."""
    for tensor, file in directory.weight_map.items():
        header = directory.headers.get(file)
        if header is not None and tensor not in header.entries:
            raise CheckpointError(
                f"{directory.path.name}/{directory.index} says that {tensor} is in {file}, which "
                "does not hold it."
            )


def dump_json(data: Any) -> str:
    """JSON as transformers writes it."""
    return json.dumps(data, indent=2, sort_keys=True) + "\n"
