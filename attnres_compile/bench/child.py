"""A measurement in a process of its own, which prints what it has found.

The process that measures calls `say_step` and `say_found`; the one that asks calls `found_by`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from attnres_compile.errors import BackendError

_STEP, _FOUND = "step", "found "


def say_step() -> None:
    """In a child: a step is done."""
    print(_STEP, flush=True)


def say_found(result: Any) -> None:
    """In a child: ``result``, as JSON."""
    print(_FOUND + json.dumps(result), flush=True)


def found_by(
    *arguments: str, environment: Mapping[str, str], tick: Callable[[], None] = lambda: None
) -> Any:
    """What ``python *arguments`` says it has found; `tick` is called after each of its steps.

    Args:
        arguments: for Python, such as ``("-m", "package.module", "argument")``.
        environment: variables besides those of this process.
        tick: called for each step.

    Raises:
        BackendError: the child failed, with the last error that it named, or found nothing.
    """
    # Imported is the package that runs here, not what the working directory holds (Python 3.11).
    variables = {**os.environ, "PYTHONSAFEPATH": "1", **environment}
    found = ""
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(
            [sys.executable, *arguments],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
        ) as child,
    ):
        try:
            for line in child.stdout or ():
                if line.strip() == _STEP:
                    tick()
                elif line.startswith(_FOUND):
                    found = line.removeprefix(_FOUND)
            child.wait()
        except BaseException:  # an interrupt is to leave no child behind
            child.kill()
            raise
        errors.seek(0)
        if child.returncode or not found:
            reason = _reason(child.returncode, errors.read())
            raise BackendError(f"the measuring process failed: {reason}")
    return json.loads(found)


def _reason(code: int, output: str) -> str:
    """The signal that ended a child, or the last error that it named; hints may follow that."""
    if code < 0:
        return f"it was killed by {signal.Signals(-code).name}; there may be too little memory."
    lines = output.strip().splitlines() or ["it said nothing"]
    named = [line for line in lines if re.match(r"[A-Za-z_][\w.]*: ", line)]
    return [*lines[-1:], *named][-1]
