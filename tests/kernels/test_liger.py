"""The specification against an implementation by others: Liger's kernel, interpreted on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tolerances import TOLERANCE
from workers import interpreting

HERE = Path(__file__).parent
CASES = [f"{count} sources of width {width}" for count in (1, 3, 9) for width in (64, 96)]


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, float]]:
    """Relative errors of the output and of every gradient, by case."""
    worker = subprocess.run(
        [sys.executable, str(HERE / "liger_worker.py")],
        env=interpreting(HERE.parent),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert worker.returncode == 0, worker.stderr
    return json.loads(worker.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_liger(case: str, errors: dict[str, dict[str, float]]) -> None:
    assert {"mixed", "sources[0]", "query", "gain"} <= errors[case].keys()
    too_large = {k: e for k, e in errors[case].items() if not e <= TOLERANCE[torch.float32]}
    assert not too_large


def test_a_gain_left_out_would_show(errors: dict[str, dict[str, float]]) -> None:
    assert all(error > 1e-3 for error in errors["gain left out"].values())
