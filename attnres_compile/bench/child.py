"""A measurement in a process of its own, which prints what it finds as its last line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from attnres_compile.errors import BackendError

STEP = "."  # a child prints such a line whenever it has done a step


def found_by(
    *arguments: str, environment: Mapping[str, str], tick: Callable[[], None] = lambda: None
) -> Any:
    """The JSON that ``python *arguments`` prints last; `tick` is called after each of its steps.

    Args:
        arguments: for Python, such as ``("-m", "package.module", "argument")``.
        environment: variables besides those of this process.
        tick: called for each line that is a `STEP`.

    Raises:
        BackendError: the child failed; with the last error that it named.
    """
    # What runs here is run there, not what the working directory holds.
    variables = {**os.environ, "PYTHONSAFEPATH": "1", **environment}
    command = [sys.executable, *arguments]
    last = ""
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, env=variables, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as child,
    ):
        for line in child.stdout or ():
            last = line.strip()
            if last == STEP:
                tick()
        if child.wait():
            errors.seek(0)
            raise BackendError(f"the measuring process failed: {_reason(errors.read())}")
    return json.loads(last)


def _reason(output: str) -> str:
    """The last error that a child named; hints may follow it."""
    lines = output.strip().splitlines() or ["no message"]
    return next((each for each in reversed(lines) if re.match(r"[\w.]+Error: ", each)), lines[-1])
