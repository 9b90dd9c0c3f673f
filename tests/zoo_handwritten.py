"""The cases of the hand-written models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import handwritten_models as models
from zoo_case import Case, Inputs, images, tokens


def case(
    name: str,
    make_model: Callable[[], nn.Module],
    make_inputs: Callable[[], Inputs],
    depths: tuple[int, ...],
    counted_in: str,
    **rest: Any,
) -> Case:
    return Case(
        name=name,
        make_model=make_model,
        make_inputs=make_inputs,
        residual_additions=sum(depths),
        depths=depths,
        sublayers=rest.pop("sublayers", depths),
        counted_in=counted_in,
        **rest,
    )


def token_model(make_block: Callable[[], nn.Module], layers: int) -> nn.Module:
    return models.TokenModel(*(make_block() for _ in range(layers)))


def image_model(make_block: Callable[[], nn.Module], layers: int) -> nn.Module:
    return models.ImageModel(*(make_block() for _ in range(layers)))


def token_inputs() -> Inputs:
    return (tokens(),), {}


def target_inputs() -> Inputs:
    return (tokens(),), {"targets": tokens()}


def image_inputs() -> Inputs:
    return (images(16),), {}


def dit_inputs() -> Inputs:
    return (torch.randn(2, 4, 8, 8), torch.tensor([0.3, 2.0]), torch.tensor([1, 7])), {}


def gpt_blocks(block: type[nn.Module], layers: int) -> Callable[[], nn.Module]:
    return partial(token_model, partial(block, 32, 4), layers)


HANDWRITTEN_CASES = (
    case("nanogpt", models.NanoGPT, token_inputs, (8,), "GPTBlock.forward: 2, 4 blocks"),
    case("nanogpt_targets", models.NanoGPT, target_inputs, (8,), "GPTBlock.forward: 2, 4 blocks"),
    case("dit", models.DiT, dit_inputs, (6,), "DiTBlock.forward: 2, 3 blocks"),
    case(
        "preact_resnet",
        models.PreActivationResNet,
        image_inputs,
        (3, 2),
        "PreActivationBlock.forward: 1, 2 stages of 3 blocks; the first block of the second stage "
        "projects its shortcut, so that its sum is a root",
        channel_dim=1,
    ),
    case(
        "parallel",
        gpt_blocks(models.ParallelBlock, 4),
        token_inputs,
        (8,),
        "ParallelBlock.forward: 2 with no read in between, 4 blocks",
        sublayers=(4,),
    ),
    case(
        "skip_on_the_right",
        gpt_blocks(models.RightSkipBlock, 3),
        token_inputs,
        (6,),
        "RightSkipBlock.forward: 2, 3 blocks",
    ),
    case(
        "alpha",
        gpt_blocks(models.AlphaBlock, 2),
        token_inputs,
        (6,),
        "AlphaBlock.forward: 3, 2 blocks",
    ),
    case(
        "lora",
        gpt_blocks(models.LoRABlock, 3),
        token_inputs,
        (6,),
        "GPTBlock.forward: 2, 3 blocks; LoRALinear adds two branches of one input",
    ),
    case(
        "fourier_mixer",
        partial(token_model, partial(models.FourierBlock, 32), 3),
        token_inputs,
        (6,),
        "FourierBlock.forward: 2, 3 blocks",
    ),
    case(
        "shift_mixer",
        partial(token_model, partial(models.ShiftBlock, 32), 3),
        token_inputs,
        (6,),
        "ShiftBlock.forward: 2, 3 blocks",
    ),
    case(
        "pooling_mixer",
        partial(image_model, partial(models.PoolingBlock, 8), 3),
        image_inputs,
        (6,),
        "PoolingBlock.forward: 2, 3 blocks",
        channel_dim=1,
    ),
    case(
        "in_place",
        partial(image_model, partial(models.InPlaceBlock, 8), 3),
        image_inputs,
        (6,),
        "InPlaceBlock.forward: `x += conv(...)`, `y += x`, 3 blocks",
        channel_dim=1,
    ),
)
HANDWRITTEN_REFUSED = (
    case(
        "no_addition",
        gpt_blocks(models.PlainBlock, 2),
        token_inputs,
        (),
        "PlainBlock.forward: adds a polynomial of x and a bias only",
        refused="no residual addition",
    ),
    case(
        "dropout_on_the_carrier",
        gpt_blocks(models.CarrierDropoutBlock, 2),
        token_inputs,
        (),
        "CarrierDropoutBlock.forward: dropout(x + branch)",
        refused="dropout",
    ),
    case(
        "narrowing_carrier",
        gpt_blocks(models.NarrowingBlock, 2),
        token_inputs,
        (),
        "NarrowingBlock.forward: (x + branch).to(torch.bfloat16)",
        refused="narrowing",
    ),
)
