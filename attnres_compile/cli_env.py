"""``attnres-compile env``: what a bug report needs."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from typing import Any

from attnres_compile.cli_screen import show

_PACKAGES = (
    *("attnres-compile", "torch", "triton", "transformers", "safetensors", "networkx", "rich"),
    *("matplotlib", "timm", "torchvision", "accelerate", "peft", "flash-linear-attention"),
    *("onnx", "onnxruntime"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


def run(args: argparse.Namespace) -> int:
    report = environment()
    lines = [f"- {name}: {value}" for name, value in report.items()]
    show(args, report, "\n".join(lines))
    return 0


def environment() -> dict[str, Any]:
    """Versions and devices by name.

    Example:
        >>> "torch" in environment()
        True
    """
    import torch

    report: dict[str, Any] = {name: _version(name) for name in _PACKAGES}
    report["python"] = platform.python_version()
    report["platform"] = platform.platform(terse=True)
    report["machine"] = platform.machine()
    report["torch threads"] = torch.get_num_threads()
    report["CUDA of torch"] = torch.version.cuda or "none"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    report["GPUs"] = ", ".join(devices) or "none"
    return report


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
