"""Keep what `save_pretrained` writes from loading as the plain model."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

SAVED_MODEL_TYPE = "attnres_compile"


def mark_config(model: nn.Module) -> None:
    """Gives a converted transformers model a config whose saved form stock loaders refuse."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_json_string"):
        return
    marked = copy.copy(config)
    marked.__class__ = _marked_class(type(config))
    _set_config(model, config, marked)


def restore_config(model: nn.Module) -> None:
    """Takes the mark off again."""
    config = getattr(model, "config", None)
    if not isinstance(config, _Marked):
        return
    plain = copy.copy(config)
    plain.__class__ = type(config)._attnres_base
    _set_config(model, config, plain)


class _Marked:
    _attnres_base: type


def _set_config(model: nn.Module, old: Any, new: Any) -> None:
    model.config = new


def _marked_class(base: type) -> type:
    return base
