"""The way to `checkpoint/onnx.py`, which needs packages that not everybody has."""

from __future__ import annotations

import importlib.util
from types import ModuleType

from attnres_compile.errors import InputError


def require(*names: str) -> None:
    """Checks that packages of the extra ``onnx`` are there.

    Raises:
        InputError: one is not.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f".onnx files need the package {name}: pip install 'attnres-compile[onnx]'."
            )


def onnx_files() -> ModuleType:
    """The module that reads and writes ``.onnx`` files.

    Raises:
        InputError: the package onnx is not installed.
    """
    require("onnx")
    from attnres_compile.checkpoint import onnx

    return onnx
