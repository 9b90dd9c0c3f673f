"""One ``.safetensors`` file: its header checked before anything is read, its data never moved.

A converted file is the original's data, byte by byte, with the new tensors behind it and a new
header in front. The original header is kept in the metadata, so that stripping gives the original
file back, bit for bit.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from attnres_compile.checkpoint.record import KEY, parse_json
from attnres_compile.checkpoint.writing import CHUNK, Advance, ignore, sha256
from attnres_compile.errors import CheckpointError

ORIGIN = f"{KEY}_origin"
"""Metadata key: header, size and SHA-256 of the file that was converted."""

TIED = f"{KEY}_tied"
"""Metadata key: names that share the tensor of another name, which the file holds."""

_LARGEST_HEADER = 25_000_000  # bytes; the limit of the Hugging Face hub
_BITS = {
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
    "F32": 32,
    "I32": 32,
    "U32": 32,
    "F16": 16,
    "BF16": 16,
    "I16": 16,
    "U16": 16,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
_CODES = {name: code for code, name in _NAMES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: dtype code, shape, and its place in the data."""

    code: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def dtype(self) -> str:
        """As PyTorch calls it."""
        return _NAMES.get(self.code, self.code)

    def to_json(self) -> dict[str, Any]:
        return {
            "dtype": self.code,
            "shape": list(self.shape),
            "data_offsets": [self.begin, self.end],
        }


@dataclass(frozen=True)
class Header:
    """The checked header of a file.

    Attributes:
        path: of the file.
        entries: by name of the tensor.
        metadata: the strings that stand beside them.
        text: the header itself.
    """

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]
    text: bytes

    @property
    def data_start(self) -> int:
        return 8 + len(self.text)

    @property
    def data_size(self) -> int:
        return max((entry.end for entry in self.entries.values()), default=0)

    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape by name."""
        return {name: (entry.dtype, entry.shape) for name, entry in self.entries.items()}


def read_header(path: Path) -> Header:
    """Reads and checks a header; no tensor is read, and nothing is allocated for one.

    Raises:
        CheckpointError: the file is no safetensors file, is cut off, or contradicts itself.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise CheckpointError(f"{path.name} is no safetensors file: it has {size} bytes.")
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, _LARGEST_HEADER):
            raise CheckpointError(
                f"{path.name} is cut off or no safetensors file: it claims a header of {length} "
                f"bytes and has {size}."
            )
        text = file.read(length)
    data = _parse(text, path)
    metadata = data.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path.name}: the metadata of its header is not text by name.")
    entries = {name: _entry(name, value, path) for name, value in data.items()}
    header = Header(path, entries, metadata, text)
    _check_layout(header, size - header.data_start)
    return header


def read_tensors(header: Header, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Tensors of a file whose header was checked; they are mapped from the disk, not copied.

    Raises:
        CheckpointError: a dtype that this PyTorch does not know.
    """
    import safetensors

    wanted = header.entries if names is None else names
    try:
        with safetensors.safe_open(header.path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in wanted}
    except (safetensors.SafetensorError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{header.path.name} cannot be read: {error}.") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file; tensors that are the same memory are written once, and noted as tied."""
    from safetensors.torch import save_file

    kept, tied = _without_ties(tensors)
    notes = {TIED: json.dumps(tied)} if tied else {}
    whole = {name: tensor.detach().contiguous() for name, tensor in kept.items()}
    save_file(whole, path, {"format": "pt", **metadata, **notes})
    path.chmod(0o666 & ~_umask())  # the library makes it readable by its owner only


def tied_names(header: Header) -> dict[str, str]:
    """Names that share a tensor, with the name that the file holds it under."""
    if TIED not in header.metadata:
        return {}
    tied = parse_json(header.metadata[TIED], f"{header.path.name}: its list of tied tensors")
    if not isinstance(tied, dict) or not all(kept in header.entries for kept in tied.values()):
        raise CheckpointError(f"{header.path.name}: its list of tied tensors names one it lacks.")
    return tied


def append_tensors(
    source: Header,
    target: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    hashed: bool = True,
    advance: Advance = ignore,
) -> None:
    """Writes a copy of a file with further tensors, from which the original can be restored."""
    end = source.data_size
    entries = dict(source.entries)
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        code = _CODES[str(tensor.dtype).removeprefix("torch.")]
        entries[name] = Entry(code, tuple(tensor.shape), end, end + size)
        end += size
    origin = {"header": source.text.decode(), "size": source.data_start + source.data_size}
    if hashed:
        origin["sha256"] = sha256(source.path, advance)
    notes = {**source.metadata, **metadata, ORIGIN: json.dumps(origin)}
    with target.open("xb") as writing:
        writing.write(_header_bytes(entries, notes))
        _copy_range(source.path, writing, source.data_start, source.data_size, advance)
        for tensor in tensors.values():
            writing.write(bytes_of(tensor))


def restore_original(source: Header, target: Path, *, advance: Advance = ignore) -> bool:
    """Writes the file that was converted, and says whether its SHA-256 was recorded and matches.

    Raises:
        CheckpointError: what comes out is not what was recorded.
    """
    what = f"{source.path.name}: the record of its original"
    origin = parse_json(source.metadata[ORIGIN], what)
    text, size = origin.get("header"), origin.get("size")
    if not isinstance(text, str) or not isinstance(size, int):
        raise CheckpointError(f"{what} is damaged.")
    header = text.encode()
    length = size - 8 - len(header)
    if not 0 <= length <= source.data_size:
        raise CheckpointError(f"{what} is damaged: {size} bytes cannot be.")
    with target.open("xb") as writing:
        writing.write(struct.pack("<Q", len(header)) + header)
        _copy_range(source.path, writing, source.data_start, length, advance)
    expected = origin.get("sha256")
    if expected is None:
        return False
    if sha256(target) != expected:
        raise CheckpointError(
            f"{source.path.name}: stripped of its Attention Residuals it is not the file that was "
            "converted; the SHA-256 recorded then does not match. Its weights were changed since."
        )
    return True


def without_tensors(
    source: Header,
    target: Path,
    names: Collection[str],
    *,
    dropped_keys: Collection[str] = (),
    advance: Advance = ignore,
) -> None:
    """Writes a copy of a file without some tensors and without some keys of its metadata."""
    order = sorted(source.entries.items(), key=lambda item: item[1].begin)
    kept = [(name, entry) for name, entry in order if name not in names]
    entries, position = {}, 0
    for name, entry in kept:
        size = entry.end - entry.begin
        entries[name] = Entry(entry.code, entry.shape, position, position + size)
        position += size
    metadata = {k: v for k, v in source.metadata.items() if k not in dropped_keys}
    with target.open("xb") as writing:
        writing.write(_header_bytes(entries, metadata))
        for _, entry in kept:
            start = source.data_start + entry.begin
            _copy_range(source.path, writing, start, entry.end - entry.begin, advance)


def bytes_of(tensor: Tensor) -> bytes:
    """The values of a small tensor as they stand in memory."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return bytes(flat.view(torch.uint8).untyped_storage())[: flat.numel() * flat.element_size()]


def _umask() -> int:
    """The process's mask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    try:
        decoded = text.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path.name} is no safetensors file: its header is no text.") from (
            error
        )
    data = parse_json(decoded, f"{path.name}: its header")
    if not isinstance(data, dict):
        raise CheckpointError(f"{path.name} is no safetensors file: its header is no object.")
    return data


def _entry(name: str, value: Any, path: Path) -> Entry:
    try:
        code, shape, offsets = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        begin, end = offsets
        numbers = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        right = numbers and (end - begin) * 8 == math.prod(shape) * _BITS[code]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path.name}: the header's entry of {_shown(name)} is damaged ({error!r:.80})."
        ) from error
    if not right:
        raise CheckpointError(
            f"{path.name}: {_shown(name)} claims bytes {begin} to {end}, which its shape "
            f"{_shown(str(list(shape)))} in {code} does not take."
        )
    return Entry(code, shape, begin, end)


def _check_layout(header: Header, available: int) -> None:
    position = 0
    for name, entry in sorted(header.entries.items(), key=lambda item: item[1].begin):
        if entry.end > available:
            raise CheckpointError(
                f"{header.path.name} is cut off: {_shown(name)} should end at byte {entry.end} of "
                f"the data, of which there are {available}."
            )
        if entry.begin != position:
            raise CheckpointError(
                f"{header.path.name}: {_shown(name)} does not start where the tensor before it "
                "ends; the header is damaged."
            )
        position = entry.end
    if position != available:
        raise CheckpointError(
            f"{header.path.name} has {available - position} bytes behind its last tensor; it is "
            "damaged or no plain safetensors file."
        )


def _shown(name: str) -> str:
    """A name that a stranger chose, fit for one line."""
    plain = name.encode("unicode_escape").decode()
    return plain if len(plain) <= 120 else f"{plain[:117]}..."


def _without_ties(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    storages: dict[int, str] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        view = (storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and view in seen:
            tied[name] = seen[view]
            continue
        # parts of one memory are not the same tensor: each is written on its own
        kept[name] = tensor.detach().clone() if storage in storages else tensor
        seen[view] = name
        storages[storage] = name
    return kept, tied


def _header_bytes(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    data: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    data.update({name: entry.to_json() for name, entry in entries.items()})
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    return struct.pack("<Q", len(text)) + text


def _copy_range(source: Path, target: BinaryIO, start: int, length: int, advance: Advance) -> None:
    with source.open("rb") as reading:
        reading.seek(start)
        while length:
            chunk = reading.read(min(length, CHUNK))
            if not chunk:
                raise CheckpointError(f"{source.name} became shorter while it was read.")
            target.write(chunk)
            length -= len(chunk)
            advance(len(chunk))
