"""Outputs that are there whole or not at all: a temporary sibling, then one rename.

What is killed on the way leaves a hidden sibling that ends in ``.attnres-partial``; `load` takes no
such path, and the input is never opened for writing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from attnres_compile.errors import AttnResError, OutputError, OutputExistsError

logger = logging.getLogger(__name__)

PARTIAL = ".attnres-partial"
CHUNK = 1 << 22
WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"})
"""Files that are linked rather than copied; everything else is small."""

_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Advance = Callable[[int], None]


def ignore(_: int) -> None:
    """Progress that nobody watches."""


@contextlib.contextmanager
def new_file(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a path to write to; afterwards the file is at `path`, or nothing is.

    The temporary file has the same name, since torch.save writes that into the file.

    Raises:
        OutputError: it cannot be written, or exists and may not be replaced.
    """
    _check_free(path, overwrite)
    if path.is_dir():
        raise OutputExistsError(f"{path} is a directory; name a file.")
    with _partial(path) as folder:
        yield folder / path.name
        _synced(folder / path.name)
        os.replace(folder / path.name, path)
        _synced(path.parent)


@contextlib.contextmanager
def new_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty directory to fill; afterwards it is at `path`, or nothing is.

    Raises:
        OutputError: it cannot be written, or exists and may not be replaced.
    """
    _check_free(path, overwrite)
    if path.exists() and not looks_like_checkpoint(path):
        raise OutputExistsError(
            f"{path} holds no checkpoint; it is not replaced, whatever is asked. Name another."
        )
    with _partial(path) as folder:
        filled = folder / path.name
        filled.mkdir()
        yield filled
        _synced(filled)
        if path.exists():
            os.rename(path, folder / "replaced")
        os.rename(filled, path)
        _synced(path.parent)


@contextlib.contextmanager
def torch_file(path: Path) -> Iterator[Any]:
    """Yields a file for PyTorch's writers, and raises afterwards what went wrong in between.

    They write through C++ whose destructors end the process when a write fails; so to them no
    write does.

    Raises:
        OSError: a write failed, since the disk is full for example.
    """
    with path.open("xb") as file:
        forgiving = _ForgivingFile(file)
        yield forgiving
        if forgiving.error is not None:
            raise forgiving.error


class _ForgivingFile:
    """Writes until the first failure, and from then on only claims to."""

    def __init__(self, file: BinaryIO) -> None:
        self.error: OSError | None = None
        self._file = file

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        if self.error is None:
            try:
                self._file.flush()
            except OSError as error:
                self.error = error


def looks_like_checkpoint(path: Path) -> bool:
    """Whether a path may be replaced by a checkpoint: one itself, or an empty directory."""
    if path.is_symlink() or not path.is_dir():
        return False
    entries = list(path.iterdir())
    weights = any(entry.suffix in WEIGHTS for entry in entries)
    return not entries or weights or (path / "config.json").exists()


def check_apart(source: Path, output: Path) -> None:
    """Refuses an output that is, lies in, or contains the input.

    Raises:
        OutputExistsError: the two overlap.
    """
    here, there = source.resolve(), output.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise OutputExistsError(
            f"the output {output} overlaps with the input {source}, which is never changed; name "
            "another."
        )


def check_space(path: Path, size: int) -> None:
    """Refuses an output for which the disk has no room.

    Raises:
        OutputError: says how much is needed and how much is free.
    """
    folder = next(each for each in (path, *path.absolute().parents) if each.is_dir())
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OutputError(
            f"{path} needs {human(size)} and the disk has {human(free)} free; nothing was written."
        )


def link_or_copy(source: Path, target: Path, *, copy: bool, advance: Advance = ignore) -> None:
    """Gives a weight file a second name, or copies it where that is asked or cannot be helped."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve()
    if not copy and source.suffix in WEIGHTS | {""}:
        try:
            os.link(source, target)
            advance(source.stat().st_size)
            return
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
    copy_file(source, target, advance)


def sha256(path: Path, advance: Advance = ignore) -> str:
    """The SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def human(size: float) -> str:
    """``1.5 GB`` for 1500000000.

    Example:
        >>> human(1_500_000_000)
        '1.5 GB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _check_free(path: Path, overwrite: bool) -> None:
    if not path.name:
        raise OutputError(f"{path} is no name for an output.")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"the folder of {path} does not exist; make it first.")
    for leftover in path.absolute().parent.glob(f".{path.name}.*{PARTIAL}"):
        logger.warning("%s is left over from an interrupted run; delete it.", leftover)
    if os.path.lexists(path) and not overwrite:
        what = "directory" if path.is_dir() else "file"
        raise OutputExistsError(
            f"{path} exists already (a {what}); name another output, or say overwrite."
        )


@contextlib.contextmanager
def _partial(path: Path) -> Iterator[Path]:
    folder = path.absolute().with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        folder.mkdir()
        yield folder
    except AttnResError:
        raise
    except Exception as error:
        _explain(path, error)
        raise
    finally:
        _restore(path, folder)
        shutil.rmtree(folder, ignore_errors=True)


def _restore(path: Path, folder: Path) -> None:
    """What was to be replaced comes back if its replacement did not arrive."""
    replaced = folder / "replaced"
    if replaced.exists() and not os.path.lexists(path):
        os.rename(replaced, path)


def _explain(path: Path, error: Exception) -> None:
    """One sentence for a disk that is full or not ours to write to.

    PyTorch and safetensors report these as errors of their own, with the cause in the text.
    """
    full = "No space left" in str(error) or "PytorchStreamWriter failed" in str(error)
    code = getattr(error, "errno", None)
    if full or code in _FULL:
        raise OutputError(
            f"{path} could not be written: the disk is full. Nothing was left behind."
        ) from error
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        raise OutputError(
            f"{path} could not be written: {error.strerror or error}. Nothing was left behind."
        ) from error


def _synced(path: Path) -> None:
    """On the disk before the rename, so that a power failure leaves no empty file of that name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_file(source: Path, target: Path, advance: Advance = ignore) -> None:
    """Copies a file of any size in pieces; the target must not exist."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reading, target.open("xb") as writing:
        while chunk := reading.read(CHUNK):
            writing.write(chunk)
            advance(len(chunk))
