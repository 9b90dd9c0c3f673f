"""``.pt``, ``.pth`` and ``.bin``: state dicts, read by PyTorch's restricted unpickler only.

A file that names other globals than tensors need is refused, with their names: opening it would run
code. Archives are checked before they are read; nothing in them may be compressed or overlap.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
import zipfile
from collections.abc import Collection, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnres_compile.checkpoint.record import KEY, parse_json
from attnres_compile.checkpoint.writing import new_file, sha256, torch_file
from attnres_compile.errors import CheckpointError, UnsafeFileError, in_words

CONTAINERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training scripts keep the state dict of the model."""

SUFFIXES = (".pt", ".pth", ".bin")
ORIGIN = f"{KEY}_origin"
"""Under this key a converted file says where its state dict stood and what file it was."""

Shapes = dict[str, tuple[str, tuple[int, ...]]]


def read_file(path: Path) -> Any:
    """What a file holds: tensors and plain containers.

    Raises:
        UnsafeFileError: it holds more, so that opening it would run code.
        CheckpointError: it is damaged or no PyTorch file.
    """
    _check_archive(path)
    loaded = _load(path)
    for name, tensor in _tensors_in(loaded):
        claimed = tensor.numel() * tensor.element_size()
        if claimed > path.stat().st_size:
            raise CheckpointError(
                f"{path.name}: {name} claims {claimed} bytes, more than the whole file has."
            )
    return loaded


def read_pickle(path: Path) -> Any:
    """What a file holds, with whatever code it runs. For files that you made yourself."""
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # arbitrary code fails in arbitrary ways
        raise CheckpointError(f"{path.name} cannot be unpickled: {in_words(error)}") from error


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of the state dict in a file, wherever in it that stands.

    Raises:
        CheckpointError: there is none.
    """
    return dict(state_dict_of(read_file(path), path))


def shapes_in(path: Path) -> Shapes:
    """Dtype and shape of every tensor, without reading any."""
    return shapes_of(state_dict_of(read_file(path), path))


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """Dtype and shape by name."""
    return {n: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()}


def state_dict_of(loaded: Any, path: Path) -> MutableMapping[str, Tensor]:
    """The state dict within what a file holds: the very mapping, to be changed in place.

    Raises:
        CheckpointError: there is none; says what there is.
    """
    mapping, _ = locate_state_dict(loaded, path)
    return mapping


def locate_state_dict(loaded: Any, path: Path) -> tuple[MutableMapping[str, Tensor], str | None]:
    """The state dict, and the key it stands under; None where the file is the state dict."""
    if isinstance(loaded, nn.Module):
        raise CheckpointError(f"{path.name} holds a whole {type(loaded).__name__}, no state dict.")
    if not isinstance(loaded, MutableMapping):
        raise CheckpointError(f"{path.name} holds a {type(loaded).__name__}, no state dict.")
    for key in CONTAINERS:
        inner = loaded.get(key)
        if isinstance(inner, MutableMapping) and _is_state_dict(inner):
            return inner, key
    if _is_state_dict(loaded):
        return loaded, None
    keys = ", ".join(str(key) for key in list(loaded)[:5]) or "nothing"
    raise CheckpointError(
        f"{path.name} holds no state dict (tensors by name); it holds: {keys:.200}."
    )


def write_converted(
    loaded: Any,
    source: Path,
    target: Path,
    new: Mapping[str, Tensor],
    record: str,
    *,
    overwrite: bool,
) -> None:
    """Writes a file with further tensors in its state dict, and everything else as it was.

    A file that is a state dict and nothing else becomes one that holds it under ``state_dict``,
    since a record among the tensors would be taken for one.
    """
    tensors, key = locate_state_dict(loaded, source)
    origin = {"key": key, "sha256": sha256(source), "content": content_hash(tensors)}
    tensors.update(new)
    whole = loaded if key is not None else {"state_dict": loaded}
    whole.update({KEY: record, ORIGIN: json.dumps(origin)})
    with new_file(target, overwrite=overwrite) as written, torch_file(written) as file:
        torch.save(whole, file)


def write_stripped(
    loaded: Any, source: Path, target: Path, dropped: Collection[str], *, overwrite: bool
) -> bool:
    """Writes a converted file without its new tensors; says whether the hashes were checked.

    The tensors are those of the original bit for bit. The file is written anew by PyTorch.

    Raises:
        CheckpointError: the tensors are not those that were recorded.
    """
    tensors, key = locate_state_dict(loaded, source)
    for name in dropped:
        tensors.pop(name, None)
    loaded.pop(KEY, None)
    text = loaded.pop(ORIGIN, None)
    origin = parse_json(text, f"{source.name}: the record of its original") if text else {}
    if origin and content_hash(tensors) != origin.get("content"):
        raise CheckpointError(
            f"{source.name}: its base weights are not those that were converted; the SHA-256 "
            "recorded then does not match. They were changed since."
        )
    flat = key is not None and (not origin or origin.get("key") is None)
    with new_file(target, overwrite=overwrite) as written, torch_file(written) as file:
        torch.save(tensors if flat else loaded, file)
    return bool(origin)


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """A SHA-256 of names, dtypes, shapes and values, whatever file they stand in.

    Example:
        >>> content_hash({"a": torch.zeros(2)}) == content_hash({"a": torch.zeros(2)})
        True
    """
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            values: Any = flat.view(torch.uint8).numpy()
            digest.update(values)
    return digest.hexdigest()


def _is_state_dict(mapping: Mapping[Any, Any]) -> bool:
    values = [value for key, value in mapping.items() if key != KEY]
    return bool(values) and all(isinstance(value, Tensor) for value in values)


def _load(path: Path) -> Any:
    mapped = zipfile.is_zipfile(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old storages, which load as they should
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        _refuse(path, error)
    except Exception as error:  # damaged files fail in every way
        raise CheckpointError(
            f"{path.name} is damaged or no PyTorch file: {in_words(error)}"
        ) from error


def _refuse(path: Path, error: Exception) -> None:
    """Says which globals a pickle asks for."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # too damaged, or too old, to be looked through
        names = []
    if not names and "Unsupported" not in str(error) and "GLOBAL" not in str(error):
        raise CheckpointError(
            f"{path.name} is damaged or no PyTorch file: {in_words(error)}"
        ) from error
    names.sort(key=lambda name: (name.startswith("torch."), name))  # a stranger's tell more
    listed = ", ".join(names[:4]) or "code"
    raise UnsafeFileError(
        f"{path.name} is a pickle that would run code when it is opened ({listed:.200}); save a "
        "state dict instead, or say --allow-pickle for a file that you made yourself."
    ) from error


def _check_archive(path: Path) -> None:
    """Refuses an archive that is more than it is stored as."""
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path.name} is empty.")
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path.name} is a damaged archive: {error}.") from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(f"{path.name} is compressed, which no PyTorch file is.")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise CheckpointError(f"{path.name} is an archive that claims more than it has.")


def _tensors_in(value: Any, name: str = "the file") -> list[tuple[str, Tensor]]:
    """All tensors in nested containers, without recursion."""
    found, pending = [], [(name, value)]
    seen: set[int] = set()  # a pickle may hold a list that holds itself
    while pending:
        where, each = pending.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, Tensor):
            found.append((where, each))
        elif isinstance(each, Mapping):
            pending += [(str(key), inner) for key, inner in each.items()]
        elif isinstance(each, list | tuple):
            pending += [(where, inner) for inner in each]
    return found
