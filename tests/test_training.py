"""Optimizer groups: every parameter once, with the learning rate and decay of its kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import attnres_compile
from attnres_compile.errors import ConfigError, InputError
from handwritten_models import NanoGPT

IDX = torch.arange(8).reshape(2, 4)


def test_every_parameter_is_in_the_group_of_its_kind() -> None:
    converted = convert()

    groups = {g["name"]: g for g in attnres_compile.param_groups(converted, lr=1e-3)}

    names = {id(p): name for name, p in converted.named_parameters()}
    found = {key: [names[id(p)] for p in group["params"]] for key, group in groups.items()}
    attnres = [name for name in names.values() if "attnres." in name]
    assert found["queries and gains"] == attnres
    assert len(attnres) == 2 * 4
    assert all(name.endswith("weight") for name in found["weights"])
    assert "token_embedding.weight" in found["weights"]
    assert {"norm.weight", "blocks.0.attention.qkv.bias"} <= set(found["norms and biases"])
    everything = [name for group in found.values() for name in group]
    assert sorted(everything) == sorted(names.values())  # the tied head once


def test_rates_and_decay() -> None:
    groups = attnres_compile.param_groups(convert(), lr=1e-3, weight_decay=0.1)

    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("weights", 1e-3, 0.1),
        ("norms and biases", 1e-3, 0.0),
        ("queries and gains", pytest.approx(1e-2), 0.0),
    ]


def test_a_query_rate_of_its_own() -> None:
    groups = attnres_compile.param_groups(convert(), lr=1e-3, query_lr=3e-2)

    assert groups[-1]["lr"] == 3e-2
    assert groups[0]["lr"] == 1e-3


def test_frozen_parameters_are_left_out() -> None:
    converted = convert()
    for name, parameter in converted.named_parameters():
        parameter.requires_grad_("attnres." in name)

    groups = attnres_compile.param_groups(converted, lr=1e-3)

    assert [group["name"] for group in groups] == ["queries and gains"]


def test_one_step_trains_the_queries() -> None:
    converted = convert()
    groups = attnres_compile.param_groups(converted, lr=1e-3)
    optimizer = torch.optim.AdamW(groups)

    converted(IDX, IDX)[1].backward()
    optimizer.step()

    queries = [p for name, p in converted.named_parameters() if name.endswith(".query")]
    # AdamW's first step is the learning rate, whatever the gradient
    assert all(query.abs().max().item() == pytest.approx(1e-2, rel=1e-3) for query in queries)


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(InputError, match="no parameter of NanoGPT requires a gradient"):
        attnres_compile.param_groups(convert().requires_grad_(False), lr=1e-3)


def test_an_unconverted_model_is_an_error() -> None:
    with pytest.raises(InputError, match="NanoGPT has no Attention Residuals of attnres_compile"):
        attnres_compile.param_groups(NanoGPT(layers=1), lr=1e-3)


@pytest.mark.parametrize("name", ["lr", "query_lr", "weight_decay"])
def test_negative_numbers_are_errors(name: str) -> None:
    options: dict[str, Any] = {"lr": 1e-3, name: -1.0}
    with pytest.raises(ConfigError, match=f"{name} must not be negative, but is -1.0"):
        attnres_compile.param_groups(nn.Identity(), **options)


def convert() -> Any:
    return attnres_compile.convert(NanoGPT(width=16, heads=2, layers=2), (IDX, IDX))
