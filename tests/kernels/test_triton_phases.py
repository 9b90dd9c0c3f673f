"""The generated kernels in Triton's interpreter: values, gradients, every element written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnres_compile.errors import BackendError
from attnres_compile.kernels import phases
from workers import interpreting

HERE = Path(__file__).parent
GROUPS = {
    "few": "one-source two-sources two-phase no-tokens no-weights "
    "wide wide-one-token many-tokens images",
    "many": "eight-sources twelve-sites thirteen-sites seventeen-sites "
    "twenty-four-sites thirty-three-sources sixty-five-sites",
}


def run_worker(*checks: str) -> dict[str, dict[str, float]]:
    """What the worker finds too far from the specification, by check; all results start as NaN."""
    worker = subprocess.run(
        [sys.executable, str(HERE / "interpreted_worker.py"), *checks],
        env=interpreting(HERE.parent, HERE),
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert worker.returncode == 0, worker.stderr
    found = dict(json.loads(line) for line in worker.stdout.splitlines() if line.startswith("["))
    assert found.keys() == set(checks)
    return found


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", pytest.param("float16", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("group", GROUPS)
def test_sizes(group: str, dtype: str) -> None:
    found = run_worker(*[f"{name}:{dtype}" for name in GROUPS[group].split()])
    assert not any(found.values()), found


@pytest.mark.slow
def test_in_double_precision() -> None:
    found = run_worker("two-phase:float64", "images:float64")
    assert not any(found.values()), found


def test_rules() -> None:
    checks = "sharp direct liger frozen missing newest layouts repeated opcheck"
    found = run_worker(*checks.split())
    assert not any(found.values()), found


def test_a_cpu_without_the_interpreter_is_an_error() -> None:
    source = torch.ones(2, 16)
    rest = (torch.ones(16), 1e-6, 1.0, "none", None, None, 0.0, None, True, -1)
    with pytest.raises(BackendError, match="set TRITON_INTERPRET=1 before Triton is imported"):
        phases.phase2(None, None, [source], [], *rest, "triton")
