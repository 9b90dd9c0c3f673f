"""Imported once by the server that workers are forked from: this takes most of a minute."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch
import torch._dynamo

torch.set_num_threads(1)

import transformers  # noqa: E402

import check_model  # noqa: E402, F401

transformers.logging.set_verbosity_error()

import tiny_transformers  # noqa: E402

tiny_transformers.architectures()  # imports every model of the library
