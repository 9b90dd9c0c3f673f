"""Tiny models of every architecture of the installed transformers, with inputs they accept.

A config is made small by the names of its fields (a hidden size is 32, a depth 2), sub-configs
included (`tiny_configs`), and inputs are made by the names of forward's arguments (`tiny_inputs`).
Names are not enough for every architecture, so there are several recipes, from the smallest to one
that only cuts depth and vocabulary; the first whose model runs is taken. What no rule covers stands
in `tiny_exceptions` and `tiny_input_exceptions`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tiny_configs import RECIPES, Recipe, tiny_config
from tiny_inputs import inputs_of

MOST_PARAMETERS = 90_000_000
_EXPORTED = re.compile(r"^__all__ = \[(.*?)\]", re.DOTALL | re.MULTILINE)
_NO_ARCHITECTURES = frozenset({"auto"})  # AutoModel looks up the others


@functools.cache
def architectures() -> dict[str, str]:
    """By the name of a ``*Model`` or ``*For...`` class: the module of transformers it is in.

    Read from the text of the library: importing all of it takes a minute.
    """
    import transformers

    found: dict[str, str] = {}
    models = Path(str(transformers.__file__)).parent / "models"
    for file in sorted(models.glob("*/modeling_*.py")):
        if file.parent.name in _NO_ARCHITECTURES:
            continue
        exported = _EXPORTED.search(file.read_text(encoding="utf-8"))
        names = re.findall(r"[\"'](\w+)[\"']", exported[1]) if exported else []
        module = f"transformers.models.{file.parent.name}.{file.stem}"
        found.update(dict.fromkeys(filter(_is_architecture, names), module))
    return found


def family_of(name: str) -> str:
    """The folder of an architecture in transformers: ``llama``."""
    return architectures()[name].split(".")[2]


@functools.cache
def main_architectures() -> tuple[str, ...]:
    """Of every family the class that all others wrap: ``LlamaModel``."""
    by_family: dict[str, list[str]] = {}
    for name in architectures():
        by_family.setdefault(family_of(name), []).append(name)
    return tuple(min(names, key=_rank) for names in by_family.values())


def build(name: str) -> tuple[nn.Module, dict[str, Any], str]:
    """A tiny model of an architecture in evaluation mode, inputs that it takes, and the recipe.

    Where the main class of a family does not run alone, the first other class of the family that
    does stands for it, and the recipe says so.

    Raises:
        ValueError: no recipe gives a model that runs; says why the first did not.
    """
    try:
        return _build(name)
    except ValueError as error:
        for other in _others_of_family(name):
            with contextlib.suppress(ValueError):
                model, kwargs, how = _build(other)
                return model, kwargs, f"{how}; {other} stands for the family"
        raise error


def _build(name: str) -> tuple[nn.Module, dict[str, Any], str]:
    cls = getattr(importlib.import_module(architectures()[name]), name)
    if getattr(cls, "forward", nn.Module.forward) is nn.Module.forward:
        raise ValueError("it has no forward: its parts are called one by one")
    failures = []
    for how in RECIPES:
        try:
            model = _model(cls, how)
            return model, inputs_of(model), how.name
        except Exception as error:  # whatever a model raises that is not built as it wants to be
            text = str(error).strip().splitlines() or [""]
            failures.append(f"{how.name}: {type(error).__name__}: {' '.join(text)[:160]}")
    raise ValueError("; ".join(failures))


def _others_of_family(name: str) -> list[str]:
    if name not in main_architectures():
        return []
    family = family_of(name)
    names = [other for other in architectures() if family_of(other) == family and other != name]
    return sorted(names, key=_rank)


def _rank(name: str) -> tuple[bool, int, str]:
    return not name.endswith("Model"), len(name), name


def _model(cls: Any, how: Recipe) -> nn.Module:
    config = tiny_config(cls.config_class, how)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        count = sum(p.numel() for p in cls(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count:,} parameters are too many")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = cls(config).float().eval()
    return model


def _is_architecture(name: str) -> bool:
    return (name.endswith("Model") or "For" in name) and not name.endswith("PreTrainedModel")
