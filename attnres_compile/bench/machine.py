"""Where a measurement was taken."""

from __future__ import annotations

import os
from typing import Any

from attnres_compile.cli_env import environment


def machine() -> dict[str, Any]:
    """Versions and devices, with how busy the machine is."""
    return {**environment(), "processors": os.cpu_count(), "load": round(os.getloadavg()[0], 2)}
