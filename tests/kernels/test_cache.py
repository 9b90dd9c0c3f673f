"""Generated sources on disk: by content, repaired, shared between processes."""

import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from attnres_compile.kernels import cache

TEXT = "VALUE = 42\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATTNRES_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_stored_once_by_content(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="attnres_compile"):
        module = cache.load("kernel", TEXT)
        assert cache.load("kernel", TEXT).VALUE == module.VALUE == 42
    (path,) = folder.iterdir()
    assert path.read_text() == TEXT
    assert module.__file__ == str(path)
    assert path in cache.kernel_paths()
    assert [record.getMessage() for record in caplog.records].count(
        f"generated kernel kernel: {path}"
    ) == 1
    assert cache.store("kernel", TEXT + "OTHER = 1\n") != path


@pytest.mark.parametrize("content", [b"", b"VALUE = 4", b"VALUE = 43\n", b"\xff\x00"])
def test_what_is_corrupt_or_foreign_is_rebuilt(folder: Path, content: bytes) -> None:
    path = cache.store("kernel", TEXT)
    path.write_bytes(content)
    assert cache.load("kernel", TEXT).VALUE == 42
    assert path.read_text() == TEXT


def test_a_directory_in_the_way(folder: Path) -> None:
    path = cache.store("kernel", TEXT)
    path.unlink()
    path.mkdir()
    assert cache.load("kernel", TEXT).VALUE == 42


@pytest.mark.parametrize("place", ["missing/deeper", "file/below"])
def test_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("ATTNRES_CACHE_DIR", str(tmp_path / place))
    path = cache.store("kernel", TEXT)
    assert path.read_text() == TEXT
    assert (tmp_path in path.parents) == (place == "missing/deeper")


SCRIPT = """
import os
from attnres_compile.kernels import cache
for i in range(200):
    text = f"VALUE = {i}" + "#" * 100_000
    path = cache.store("kernel", text)
    assert path.read_text() == text
"""


def test_several_processes_at_once(folder: Path) -> None:
    workers = [subprocess.Popen([sys.executable, "-c", SCRIPT]) for _ in range(3)]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0, 0]
    assert len(list(folder.iterdir())) == 200  # and no temporary file


def test_default_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTNRES_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", os.sep + "somewhere")
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache.directory() == Path(os.sep, "somewhere", "attnres_compile")


def test_a_user_without_a_home_keeps_kernels_in_a_temporary_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("ATTNRES_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(OSError, match="no directory for caches: Could not determine"):
        cache.directory()
    path = cache.store("kernel", "x = 1\n")
    assert path.read_text() == "x = 1\n"
    assert Path(tempfile.gettempdir()) in path.parents
