"""Killed, or out of disk: the input is unharmed, and nothing is left that loads."""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import attnres_compile
from attnres_compile import AttnResConfig
from attnres_compile.checkpoint import converting, writing
from attnres_compile.checkpoint.converting import Options, convert_source
from attnres_compile.checkpoint.sources import Source
from attnres_compile.checkpoint.stripping import strip_source
from attnres_compile.cli import main
from attnres_compile.errors import AttnResError, CheckpointError, OutputError
from attnres_compile.plans import ConversionPlan
from checkpoint.models import CUSTOM, LLAMA, bytes_in

CONFIG = AttnResConfig(num_blocks=2)
KILLS = 20


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded model with a large file beside it, so that copying takes a while."""
    path = tmp_path_factory.mktemp("killed") / "source"
    LLAMA.build().save_pretrained(path, max_shard_size="20KB")
    (path / "notes.dat").write_bytes(os.urandom(60_000_000))
    return path


@pytest.fixture(scope="module")
def plan(source: Path) -> ConversionPlan:
    return converting.plan_source(Source(source), CONFIG)


@pytest.fixture
def planned(plan: ConversionPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned beforehand: what is to be interrupted is the writing."""
    monkeypatch.setattr(converting, "_plan", lambda *_: plan)


@pytest.mark.usefixtures("planned")
def test_killed_at_random_moments(source: Path, tmp_path: Path) -> None:
    before = bytes_in(source)
    start = time.monotonic()
    assert in_a_fork(source, tmp_path / "whole") == 0
    whole = time.monotonic() - start
    assert attnres_compile.load(tmp_path / "whole") is not None
    shutil.rmtree(tmp_path / "whole")

    moments = random.Random(4)
    interrupted = 0
    for number in range(KILLS):
        folder = tmp_path / str(number)
        folder.mkdir()
        code = in_a_fork(source, folder / "out", kill_after=moments.uniform(0, whole))
        interrupted += code == -signal.SIGKILL
        assert_nothing_loads(folder, unless_whole=code == 0)
        shutil.rmtree(folder)
    assert interrupted >= KILLS // 2
    assert bytes_in(source) == before


@pytest.mark.usefixtures("planned")
@pytest.mark.parametrize("name", ["link_or_copy", "write_tensors", "_write_index", "_write_card"])
def test_killed_at_every_kind_of_step(
    name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(f"attnres_compile.checkpoint.dressing.{name}", kill)
    assert in_a_fork(source, tmp_path / "out") == -signal.SIGKILL
    assert_nothing_loads(tmp_path)


@pytest.mark.usefixtures("planned")
def test_an_interrupted_run_is_mentioned_and_does_not_stand_in_the_way(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leftover = tmp_path / f".out.1234{writing.PARTIAL}"
    leftover.mkdir()
    caplog.set_level(logging.WARNING, "attnres_compile")  # a command may have been run quietly
    convert_source(Source(source), tmp_path / "out", CONFIG, Options(hashed=False))
    assert leftover.name in caplog.text


@pytest.mark.usefixtures("planned")
def test_an_error_on_the_way_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise CheckpointError("x is damaged.")

    monkeypatch.setattr("attnres_compile.checkpoint.dressing.write_tensors", fail)
    with pytest.raises(CheckpointError):
        convert_source(Source(source), tmp_path / "out", CONFIG, Options())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("planned")
def test_what_was_to_be_replaced_survives_an_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_source(Source(source), tmp_path / "out", CONFIG, Options(hashed=False))
    before = bytes_in(tmp_path / "out")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("attnres_compile.checkpoint.dressing.write_tensors", fail)
    with pytest.raises(OutputError, match="the disk is full"):
        convert_source(Source(source), tmp_path / "out", CONFIG, Options(overwrite=True))
    assert bytes_in(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 300 kB of which the free space cannot be told beforehand."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(disk)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("no right to mount a small disk here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def wide() -> torch.nn.Module:
    """A model of about 1 MB."""
    with torch.device(torch.get_default_device()):
        model = CUSTOM.build()
        model.head = torch.nn.Linear(8, 30_000)
    return model


def write_directory(path: Path) -> None:
    LLAMA.build().save_pretrained(path)
    (path / "notes.dat").write_bytes(os.urandom(400_000))


def write_safetensors(path: Path) -> None:
    from safetensors.torch import save_model

    save_model(wide(), str(path))


def write_program(path: Path) -> None:
    torch.export.save(torch.export.export(wide(), (torch.randn(6, 5),)), path)


WRITERS: dict[str, Callable[[Path], object]] = {
    "source": write_directory,
    "source.safetensors": write_safetensors,
    "source.pt": lambda path: torch.save(wide().state_dict(), path),
    "source.pt2": write_program,
}


@pytest.mark.parametrize("told", [True, False], ids=["told", "not told"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk(
    name: str,
    told: bool,
    tmp_path: Path,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whether the free space is known beforehand or not."""
    source, output = tmp_path / name, small_disk / f"out{Path(name).suffix}"
    WRITERS[name](source)
    before = source.read_bytes() if source.is_file() else bytes_in(source)
    if not told:
        monkeypatch.setattr(converting, "check_space", lambda *_: None)
    model = ["--model", "checkpoint.test_interrupted:wide", "--input-shape", "6,5"]
    options = [] if source.suffix in ("", ".pt2") else model

    capsys.readouterr()
    code = main(["convert", str(source), str(output), "-q", *options])

    sentence = capsys.readouterr().err.strip()
    assert code == 1, sentence
    assert "the disk" in sentence
    assert "\n" not in sentence
    assert list(small_disk.iterdir()) == []
    assert (source.read_bytes() if source.is_file() else bytes_in(source)) == before


def test_saving_to_a_full_disk(small_disk: Path) -> None:
    model = wide()
    converted = attnres_compile.convert(model, (torch.randn(6, 5),))
    for name in ("x.safetensors", "x.pt", "x"):
        with pytest.raises(OutputError, match="the disk is full"):
            attnres_compile.save(converted, small_disk / name)
    assert list(small_disk.iterdir()) == []


def test_stripping_to_a_full_disk(tmp_path: Path, small_disk: Path) -> None:
    converted = attnres_compile.convert(wide(), (torch.randn(6, 5),))
    attnres_compile.save(converted, tmp_path / "x.safetensors")
    with pytest.raises(OutputError):
        strip_source(Source(tmp_path / "x.safetensors"), small_disk / "y.safetensors", Options())
    assert list(small_disk.iterdir()) == []


def in_a_fork(source: Path, output: Path, kill_after: float | None = None) -> int:
    """Converts in a child process; returns its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            convert_source(Source(source), output, CONFIG, Options(copy=True))
            os._exit(0)
        except BaseException:
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def assert_nothing_loads(folder: Path, *, unless_whole: bool = False) -> None:
    for path in [*folder.iterdir(), *folder.glob(".*/*")]:
        if unless_whole and path.name == "out" and path.parent == folder:
            continue
        whole_by_rename = path == folder / "out"
        if whole_by_rename:  # killed after the rename: then it must be complete
            assert attnres_compile.load(path) is not None
            continue
        with pytest.raises(AttnResError):
            attnres_compile.load(path)
