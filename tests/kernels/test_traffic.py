"""Rows per token that the kernels of a block load and store, counted in the interpreter."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from attnres_compile.errors import BackendError
from attnres_compile.kernels.traffic import count_traffic
from workers import interpreting

HERE = Path(__file__).parent
COMPLETED = 8
# The limits include scalars per token, queries, norm weights and what is left to be summed.
LIMITS = {6: {"forward": 44, "backward": 66}, 12: {"forward": 84, "backward": 112}}


def run_block(sites: int, width: int, dtype: str = "bfloat16") -> dict[str, Any]:
    worker = subprocess.run(
        [
            sys.executable,
            str(HERE / "traffic_worker.py"),
            str(sites),
            str(width),
            "512",
            dtype,
        ],
        env=interpreting(),
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert worker.returncode == 0, worker.stderr
    found: dict[str, Any] = json.loads(worker.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("sites", "width"),
    [(6, 1024), *(pytest.param(n, 4096, marks=pytest.mark.slow) for n in (6, 12))],
)
def test_rows_of_a_block(sites: int, width: int) -> None:
    """Narrow rows too: the narrower, the more the scalars per token count."""
    found = run_block(sites, width)
    n, s = COMPLETED, sites
    assert found["forward"]["kernels"] == {
        "phase1_forward": n + s,
        "phase2_forward": 2 + 3 + 5 * (s - 2),
        "complete_forward": 3,
    }
    assert found["backward"]["kernels"] == {
        "phase1_backward": n - 1 + s + 2 * n,
        "phase2_backward": 3 + 6 * (s - 1),
        "complete_backward": 3,
    }
    for direction, limit in LIMITS[sites].items():
        total = sum(found[direction][kind] for kind in ("row", "statistic", "vector"))
        assert total <= limit, f"{direction}: {total}"


@pytest.mark.slow
def test_float16_reads_one_row_more() -> None:
    """The newest source, whose gradients of logits would not be held to 2e-3 without it."""
    n, s = COMPLETED, 6
    kernels = run_block(s, 1024, "float16")["backward"]["kernels"]
    assert kernels["phase1_backward"] == n + s + 2 * n


def test_only_the_interpreter_counts() -> None:
    with pytest.raises(BackendError, match="set TRITON_INTERPRET=1"), count_traffic():
        pass
