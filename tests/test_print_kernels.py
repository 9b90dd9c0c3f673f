"""Where generated kernels lie: the option print_kernels, and the log.

A script as well: Triton reads TRITON_INTERPRET when it is imported, so the test compiles in a
process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from attnres_compile.errors import BackendError
from attnres_compile.functional import attnres
from workers import interpreting

HERE = Path(__file__).parent


def one_mix(x: torch.Tensor) -> torch.Tensor:
    return attnres([x, torch.sin(x)], torch.ones(x.shape[-1]))


def compile_and_run(width: int, **options: Any) -> None:
    """Forward and backward."""
    torch._dynamo.reset()
    compiled: Any = torch.compile(one_mix, backend="attnres", fullgraph=True, options=options)
    compiled(torch.randn(3, width, requires_grad=True)).sum().backward()


def stages() -> None:
    for title, width, options in [
        ("not asked for", 8, {"kernels": "triton"}),
        ("asked for", 8, {"kernels": "triton", "print_kernels": True}),
        ("other kernels", 16, {"kernels": "triton", "print_kernels": True}),
        ("none are generated", 32, {"kernels": "reference", "print_kernels": True}),
    ]:
        print("stage", title, file=sys.stderr)
        compile_and_run(width, **options)


def test_the_files_of_all_kernels_are_printed_once(tmp_path: Path) -> None:
    log, printed = run_stages(tmp_path, TORCH_LOGS="+attnres_compile")
    assert not printed["not asked for"]
    files = {str(path) for path in tmp_path.iterdir()}
    names = {Path(file).name.rsplit("_", 1)[0] for file in files}
    assert {"phase2_forward", "phase2_backward"} <= names
    assert len(printed["asked for"]) == len(printed["other kernels"]) >= 2
    assert sorted(printed["asked for"] + printed["other kernels"]) == sorted(files)
    assert not printed["none are generated"]
    # The log says the same, from the start on.
    assert sorted(line.split(": ", 1)[1] for line in log) == sorted(files)


def run_stages(folder: Path, **variables: str) -> tuple[list[str], dict[str, list[str]]]:
    """What the log says of kernels, and what is printed of them in each stage."""
    worker = subprocess.run(
        [sys.executable, __file__],
        env={**interpreting(HERE), "ATTNRES_CACHE_DIR": str(folder), **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert worker.returncode == 0, worker.stderr[-4000:]
    log: list[str] = []
    printed: dict[str, list[str]] = {}
    for line in worker.stderr.splitlines():
        if line.startswith("stage "):
            title = line.removeprefix("stage ")
            printed[title] = []
        elif line.startswith("generated kernel: "):
            printed[title].append(line.removeprefix("generated kernel: "))
        elif "] generated kernel " in line:
            log.append(line.split("] generated kernel ")[1])
    return log, printed


def test_what_is_no_bool_is_an_error() -> None:
    with pytest.raises(Exception, match="print_kernels='yes' is no bool; use True or") as caught:
        compile_and_run(8, print_kernels="yes")
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), BackendError)


if __name__ == "__main__":
    assert os.environ["TRITON_INTERPRET"] == "1"
    torch.set_num_threads(1)
    stages()
