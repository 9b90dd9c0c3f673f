"""Models of torch, torchvision and timm, small enough to build in a moment."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from zoo_case import Case, Inputs, images


def encoder(*, norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        32, 4, dim_feedforward=48, batch_first=True, norm_first=norm_first
    )
    norm = nn.LayerNorm(32) if norm_first else None
    return nn.TransformerEncoder(layer, 3, norm=norm, enable_nested_tensor=False)


def encoder_decoder() -> nn.Module:
    return nn.Transformer(32, 4, 2, 3, dim_feedforward=48, batch_first=True, norm_first=True)


def encoder_decoder_inputs() -> Inputs:
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    # Without the second argument the model compares the mask's values, which no capture survives.
    causal = {"tgt_mask": mask, "tgt_is_causal": True}
    return (torch.randn(2, 7, 32), torch.randn(2, 5, 32)), causal


def vision_transformer() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=3,
        num_heads=4,
        hidden_dim=32,
        mlp_dim=48,
        num_classes=10,
    )


def convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    settings = [CNBlockConfig(8, 16, 2), CNBlockConfig(16, 24, 3), CNBlockConfig(24, None, 2)]
    return ConvNeXt(settings, stochastic_depth_prob=0.1, num_classes=10)


def swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer(
        patch_size=[2, 2],
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[4, 4],
        num_classes=10,
    )


def mobilenet_v2() -> nn.Module:
    from torchvision.models import mobilenet_v2

    return mobilenet_v2(width_mult=0.5, num_classes=10)


def resnet() -> nn.Module:
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [2, 2, 2, 2], width_per_group=4, num_classes=10)


def timm_model(name: str, **settings: Any) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=10, **settings)


def mixer() -> nn.Module:
    # The named models fix their width and depth.
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(img_size=32, patch_size=8, num_blocks=3, embed_dim=32, num_classes=10)


def image_case(name: str, make: Any, depths: tuple[int, ...], size: int = 32, **rest: Any) -> Case:
    return Case(
        name=name,
        make_model=make,
        make_inputs=lambda: ((images(size),), {}),
        residual_additions=sum(depths),
        depths=depths,
        sublayers=depths,
        **rest,
    )


TORCH_CASES = (
    Case(
        name="nn_transformer_encoder",
        make_model=partial(encoder, norm_first=True),
        make_inputs=lambda: ((torch.randn(2, 7, 32),), {}),
        residual_additions=6,
        depths=(6,),
        sublayers=(6,),
        counted_in="nn.TransformerEncoderLayer.forward with norm_first: 2, 3 layers",
    ),
    Case(
        name="nn_transformer",
        make_model=encoder_decoder,
        make_inputs=encoder_decoder_inputs,
        residual_additions=13,
        depths=(4, 9),
        sublayers=(4, 9),
        counted_in="nn.TransformerEncoderLayer.forward: 2, 2 layers; "
        "nn.TransformerDecoderLayer.forward: 3, 3 layers",
    ),
    image_case(
        "torchvision_vit",
        vision_transformer,
        (6,),
        counted_in="vision_transformer.EncoderBlock.forward: `x + input`, `x + y`, 3 layers",
    ),
    image_case(
        "torchvision_convnext",
        convnext,
        (2, 3, 2),
        channel_dim=1,
        counted_in="convnext.CNBlock.forward: `result += input`, stages of 2, 3, 2 blocks",
    ),
    image_case(
        "torchvision_swin",
        swin,
        (4, 4),
        counted_in="swin_transformer.SwinTransformerBlock.forward: 2, stages of 2 blocks",
    ),
    image_case(
        "torchvision_mobilenet_v2",
        mobilenet_v2,
        (2, 3, 2, 2),
        channel_dim=1,
        too_short=1,
        counted_in="mobilenetv2.InvertedResidual.forward: 1 if the stride is 1 and the widths are "
        "equal; stages of 1, 2, 3, 4, 3, 3, 1 blocks whose first has none: 0, 1, 2, 3, 2, 2, 0",
    ),
    image_case(
        "timm_vit",
        partial(
            timm_model,
            "vit_tiny_patch16_224",
            img_size=32,
            patch_size=8,
            embed_dim=32,
            depth=3,
            num_heads=4,
        ),
        (6,),
        counted_in="vision_transformer.Block.forward: 2, 3 blocks",
    ),
    image_case(
        "timm_eva02",
        partial(
            timm_model,
            "eva02_tiny_patch14_224",
            img_size=32,
            patch_size=8,
            embed_dim=32,
            depth=3,
            num_heads=4,
        ),
        (6,),
        counted_in="eva.EvaBlock.forward: 2, 3 blocks",
    ),
    image_case(
        "timm_mixer",
        mixer,
        (6,),
        counted_in="mlp_mixer.MixerBlock.forward: 2 (tokens, channels), 3 blocks",
    ),
)
TORCH_REFUSED = (
    image_case(
        "torchvision_resnet",
        resnet,
        (),
        channel_dim=1,
        refused="post-activation",
        counted_in="resnet.Bottleneck.forward: `out += identity`, then relu",
    ),
    Case(
        name="nn_transformer_encoder_post_norm",
        make_model=partial(encoder, norm_first=False),
        make_inputs=lambda: ((torch.randn(2, 7, 32),), {}),
        residual_additions=0,
        depths=(),
        sublayers=(),
        refused="post-norm",
        counted_in="nn.TransformerEncoderLayer.forward without norm_first: norm(x + branch)",
    ),
)
