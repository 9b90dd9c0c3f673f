"""Good checkpoints to be damaged, and what a refusal has to look like."""

from __future__ import annotations

import contextlib
import resource
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import attnres_compile
from attnres_compile import AttnResConfig
from attnres_compile.checkpoint.converting import Options, convert_source
from attnres_compile.checkpoint.sources import Source
from attnres_compile.cli import main
from attnres_compile.errors import AttnResError
from checkpoint.models import CUSTOM, LLAMA

Damage = Callable[[Path], None]


def write_good(home: Path) -> None:
    """A good checkpoint of each kind, plain and converted."""
    LLAMA.build().save_pretrained(home / "plain", max_shard_size="20KB")
    config = AttnResConfig(num_blocks=2)
    convert_source(Source(home / "plain"), home / "converted", config, Options())
    converted = attnres_compile.convert(CUSTOM.build(), (), CUSTOM.call(), config=config)
    attnres_compile.save(converted, home / "model.safetensors")
    attnres_compile.save(converted, home / "model.pt")
    torch.save(CUSTOM.build().state_dict(), home / "plain.pt")
    program = torch.export.export(CUSTOM.build(), tuple(CUSTOM.call().values()))
    torch.export.save(program, home / "plain.pt2")


def copied(source: Path, target: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(source, target) if source.is_dir() else Path(shutil.copy(source, target))


def cut(size: int) -> Damage:
    """Only the first bytes of a file."""
    return lambda path: path.write_bytes(path.read_bytes()[:size]) and None


def refused(capsys: pytest.CaptureFixture[str], path: Path, *argv: str) -> None:
    """One sentence, exit code 1 or 2, and nothing run."""
    capsys.readouterr()
    code = main([*argv, "-q"])
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert code in (1, 2), captured
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("attnres-compile: ")
    assert "unexpected" not in lines[0]
    assert lines[0].endswith((".", "?")), lines[0]
    assert not (path.parent / "ran").exists()


def memory_of(call: Callable[[], Any]) -> int:
    """The most that a call takes of Python's memory, or of the process's beyond a little."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tracemalloc.start()
    with contextlib.suppress(AttnResError):
        call()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return max(peak, grown - 30_000_000)
