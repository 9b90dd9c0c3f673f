"""Imported once by the server that workers are forked from: what each of them would do again."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch
import torch._dynamo

torch.set_num_threads(1)

import transformers  # noqa: E402
import transformers.modeling_utils  # noqa: E402

import attnres_compile.conversion  # noqa: E402
import attnres_compile.verification  # noqa: E402, F401
import check_model  # noqa: E402, F401
import tiny_transformers  # noqa: E402
from attnres_compile.capture import capture  # noqa: E402

transformers.logging.set_verbosity_error()
model, kwargs, _ = tiny_transformers.build("LlamaModel")
capture(model, (), kwargs)  # what Dynamo imports at its first call; no backward before a fork
