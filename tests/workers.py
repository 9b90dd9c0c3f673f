"""Processes of their own for what has to be decided before PyTorch and Triton are imported."""

from __future__ import annotations

import os
from pathlib import Path


def interpreting(*folders: Path) -> dict[str, str]:
    """The environment in which Triton's kernels are interpreted and tests import from `folders`.

    A PYTHONPATH that is set already stays: a worker has to find the package that its test found.
    """
    known = os.environ.get("PYTHONPATH")
    paths = [*map(str, folders), *([known] if known else [])]
    return {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
