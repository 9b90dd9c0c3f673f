"""Generated sources on disk: stored by their content, checked before use, rebuilt when in doubt.

The directory is ``$ATTNRES_CACHE_DIR``, else ``attnres_compile`` in the user's cache directory;
if it cannot be written to, a temporary one of this process. A file's name carries the hash of its
text, so that processes that store the same kernel at the same time store the same bytes; each
writes to a file of its own and renames it. What is executed is the text that was asked for, never
what happens to lie on disk: a truncated, edited or foreign file is replaced.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from types import ModuleType

logger = logging.getLogger("attnres_compile")

_used: dict[Path, None] = {}
_printing = False


def kernel_paths() -> list[Path]:
    """The generated sources that this process has used so far, in the order of their first use."""
    return list(_used)


def print_kernels() -> None:
    """Has this process name its generated sources on stderr, each of them once.

    Those that it has used so far it names now, others at their first use: a kernel is generated at
    its first launch, which for a backward pass is long after the graph was compiled.
    """
    global _printing
    if not _printing:
        _printing = True
        for path in kernel_paths():
            _print(path)


def load(name: str, text: str) -> ModuleType:
    """The module that ``text`` defines, backed by a file, since Triton reads a kernel's source."""
    path = store(name, text)
    if path not in _used:
        _used[path] = None
        logger.debug("generated kernel %s: %s", name, path)
        if _printing:
            _print(path)
    module = ModuleType(f"attnres_compile_generated.{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where inspect looks for the source of its functions
    exec(compile(text, str(path), "exec"), module.__dict__)
    return module


def store(name: str, text: str) -> Path:
    """Where ``text`` lies, after writing it if it did not."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:20]
    file = f"{name}_{digest}.py"
    try:
        return _store_in(directory(), file, text)
    except OSError as error:
        fallback = _temporary_directory()
        logger.debug("cannot keep kernels for the user (%s); using %s", error, fallback)
        return _store_in(fallback, file, text)


def directory() -> Path:
    """Where generated sources are kept.

    Raises:
        OSError: the user has no home directory.
    """
    if configured := os.environ.get("ATTNRES_CACHE_DIR"):
        return Path(configured)
    try:
        base = _user_cache()
    except RuntimeError as error:  # in containers a user may have no home
        raise OSError(f"there is no directory for caches: {error}") from error
    return base / "attnres_compile"


def _user_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _print(path: Path) -> None:
    print(f"generated kernel: {path}", file=sys.stderr)


def _store_in(folder: Path, file: str, text: str) -> Path:
    path = folder / file
    if _holds(path, text):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{file}.", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(text.encode())
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_bytes() == text.encode()
    except OSError:
        return False


@lru_cache(maxsize=1)
def _temporary_directory() -> Path:
    return Path(tempfile.mkdtemp(prefix="attnres_compile-"))
