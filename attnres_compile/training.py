"""Optimizer groups for a converted model."""

from __future__ import annotations

from typing import Any

from torch import nn

from attnres_compile.errors import ConfigError, InputError
from attnres_compile.inspection import attnres_parameters

QUERY_LR_FACTOR = 10.0
"""Default learning rate of queries and gains over that of the weights.

Queries start at zero and have to find a direction while everything else is close to its goal;
people who trained them report 6 to 100 times the learning rate of the weights.
"""


def param_groups(
    converted: nn.Module,
    *,
    lr: float,
    query_lr: float | None = None,
    weight_decay: float = 0.01,
) -> list[dict[str, Any]]:
    """Groups for a `torch.optim` optimizer, by what each parameter needs.

    ========================  ===========================  ==============  ============
    name                      parameters                   learning rate   weight decay
    ========================  ===========================  ==============  ============
    ``weights``               base, 2-D and more           ``lr``          as given
    ``norms and biases``      base, 0-D and 1-D            ``lr``          0
    ``queries and gains``     Attention Residuals          ``query_lr``    0
    ========================  ===========================  ==============  ============

    A decayed query is pulled towards attending to all sources alike, and a decayed gain switches
    its query off; neither is wanted.

    Args:
        converted: what `convert` returned.
        lr: learning rate of the model's own parameters.
        query_lr: that of queries and gains; 10 times `lr` when not given.
        weight_decay: of the weights.

    Returns:
        The groups that are not empty. Each parameter that requires a gradient is in exactly one
        of them, a tied weight once.

    Raises:
        InputError: the model was not converted, or no parameter requires a gradient.
        ConfigError: a learning rate or the weight decay is negative.

    Example:
        >>> import attnres_compile, torch, torchvision
        >>> model = attnres_compile.convert(torchvision.models.vit_b_16())
        >>> groups = attnres_compile.param_groups(model, lr=1e-4, query_lr=1e-2)
        >>> [(g["name"], g["lr"], g["weight_decay"]) for g in groups][-1]
        ('queries and gains', 0.01, 0.0)
        >>> optimizer = torch.optim.AdamW(groups)
    """
    if query_lr is None:
        query_lr = QUERY_LR_FACTOR * lr
    for name, value in (("lr", lr), ("query_lr", query_lr), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ConfigError(f"{name} must not be negative, but is {value!r}.")
    new = {id(parameter) for parameter in attnres_parameters(converted).values()}
    trained = [p for p in converted.parameters() if p.requires_grad]
    if not trained:
        raise InputError(
            f"no parameter of {type(converted).__name__} requires a gradient; there is nothing to "
            "train. Call requires_grad_() on what should be."
        )
    base = [p for p in trained if id(p) not in new]
    groups = [
        _group("weights", [p for p in base if p.ndim >= 2], lr, weight_decay),
        _group("norms and biases", [p for p in base if p.ndim < 2], lr, 0.0),
        _group("queries and gains", [p for p in trained if id(p) in new], query_lr, 0.0),
    ]
    return [group for group in groups if group["params"]]


def _group(name: str, params: list[nn.Parameter], lr: float, weight_decay: float) -> dict[str, Any]:
    return {"name": name, "params": params, "lr": lr, "weight_decay": weight_decay}
