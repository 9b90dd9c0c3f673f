"""An ``.onnx`` file of a small model, and its conversion."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnres_compile import AttnResConfig
from attnres_compile.checkpoint.onnx import convert_file
from onnx_cases import chain, save


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return save(chain(), tmp_path / "plain.onnx")


@pytest.fixture
def converted(plain: Path) -> Path:
    target = plain.with_name("converted.onnx")
    convert_file(plain, target, AttnResConfig(), {})
    return target
