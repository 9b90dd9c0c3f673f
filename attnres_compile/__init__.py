"""Attention Residuals for any PyTorch model: trace it, find its residual additions, rewrite them.

    import attnres_compile

    print(attnres_compile.plan(model))
    converted = attnres_compile.convert(model)      # same class, lossless at the start

Importing this package is cheap: everything is loaded at its first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnres_compile import errors as errors
    from attnres_compile import functional as functional
    from attnres_compile.checkpoint.saving import load as load
    from attnres_compile.checkpoint.saving import save as save
    from attnres_compile.config import AttnResConfig as AttnResConfig
    from attnres_compile.conversion import convert as convert
    from attnres_compile.conversion import strip as strip
    from attnres_compile.errors import AttnResError as AttnResError
    from attnres_compile.exporting import export as export
    from attnres_compile.inspection import depth_attention as depth_attention
    from attnres_compile.planning import plan as plan
    from attnres_compile.plans import ConversionPlan as ConversionPlan
    from attnres_compile.training import param_groups as param_groups
    from attnres_compile.verification import VerifyReport as VerifyReport
    from attnres_compile.verification import verify as verify

__version__ = "0.1.0"

_HOMES = {
    "AttnResConfig": "attnres_compile.config",
    "AttnResError": "attnres_compile.errors",
    "ConversionPlan": "attnres_compile.plans",
    "VerifyReport": "attnres_compile.verification",
    "convert": "attnres_compile.conversion",
    "depth_attention": "attnres_compile.inspection",
    "export": "attnres_compile.exporting",
    "load": "attnres_compile.checkpoint.saving",
    "param_groups": "attnres_compile.training",
    "plan": "attnres_compile.planning",
    "save": "attnres_compile.checkpoint.saving",
    "strip": "attnres_compile.conversion",
    "verify": "attnres_compile.verification",
}
_MODULES = ("errors", "functional")

__all__ = sorted([*_HOMES, *_MODULES, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"attnres_compile.{name}")
    raise AttributeError(f"module 'attnres_compile' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
