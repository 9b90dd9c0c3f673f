"""What every test gets: one thread, fixed seeds, a fresh Dynamo and no network."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator

# Read when the libraries are imported, hence set before torch is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Compile in the test's own process, and never answer from a graph that older code has compiled.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")

import hypothesis
import pytest
import torch

torch.set_num_threads(1)

# Tracing a model takes longer than hypothesis expects of an example.
hypothesis.settings.register_profile(
    "attnres",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("attnres")


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """Start from the same seeds, and leave neither compiled code nor a default dtype behind."""
    random.seed(0)
    torch.manual_seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    default_dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(default_dtype)
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()
