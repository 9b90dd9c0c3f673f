"""Further families: the ones that no list asks for, and the ones that are easy to get wrong."""

from __future__ import annotations

from functools import partial

from torch import nn

import handwritten_extra as models
from handwritten_models import GPTBlock, InPlaceBlock
from zoo_case import Case, Inputs, tokens
from zoo_encoders import t5_inputs
from zoo_extra_transformers import EXTRA_DECODERS, EXTRA_ENCODERS
from zoo_handwritten import case, gpt_blocks, image_inputs, image_model, token_inputs
from zoo_handwritten import token_model as handwritten_token_model
from zoo_torch import image_case, timm_model
from zoo_transformers import SMALL, token_model

VIT_SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}


def two_token_inputs() -> Inputs:
    return (tokens(), tokens()), {}


def cait() -> nn.Module:
    from timm.models.cait import Cait

    return Cait(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=3,
        num_heads=4,
        depth_token_only=2,
        num_classes=10,
    )


def resmlp() -> nn.Module:
    from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock

    return MlpMixer(
        img_size=32,
        patch_size=8,
        num_blocks=3,
        embed_dim=32,
        mlp_ratio=4,
        block_layer=ResBlock,
        norm_layer=Affine,
        num_classes=10,
    )


def norm_free_resnet() -> nn.Module:
    from timm.models.nfnet import NfCfg, NormFreeNet

    config = NfCfg(depths=(3, 3), channels=(16, 32), stem_type="3x3", stem_chs=16)
    return NormFreeNet(config, num_classes=10)


def convmixer() -> nn.Module:
    from timm.models.convmixer import ConvMixer

    return ConvMixer(16, 3, kernel_size=3, patch_size=4, num_classes=10)


EXTRA_TIMM = (
    image_case(
        "timm_deit3",
        partial(timm_model, "deit3_small_patch16_224", **VIT_SIZES),
        (6,),
        counted_in="vision_transformer.Block.forward: 2, 3 blocks",
    ),
    image_case(
        "timm_vit_parallel",
        partial(timm_model, "vit_small_patch16_18x2_224", **VIT_SIZES),
        (6,),
        counted_in="ParallelThingsBlock.forward: 2 sums of stacked branches, 3 blocks",
    ),
    image_case(
        "timm_cait",
        cait,
        (6, 4),
        counted_in="LayerScaleBlock.forward: 2, 3 blocks; LayerScaleBlockClassAttn.forward: 2 on "
        "the class token, 2 blocks",
    ),
    image_case("timm_resmlp", resmlp, (6,), counted_in="mlp_mixer.ResBlock.forward: 2, 3 blocks"),
    image_case(
        "timm_nf_resnet",
        norm_free_resnet,
        (2, 2),
        channel_dim=1,
        counted_in="NormFreeBlock.forward: 1 where the shortcut is x; 2 stages of 3 blocks whose "
        "first projects",
    ),
    image_case(
        "timm_efficientnet",
        partial(timm_model, "efficientnet_b0"),
        (2, 2, 3),
        channel_dim=1,
        too_short=2,
        counted_in="InvertedResidual.forward: 1 if has_skip; stages of 1, 2, 2, 3, 3, 4, 1 blocks "
        "whose first has none: 0, 1, 1, 2, 2, 3, 0",
    ),
)

EXTRA_HANDWRITTEN = (
    case(
        "nested_groups",
        partial(image_model, partial(models.ResidualGroup, 8, 2), 2),
        image_inputs,
        (2, 2, 2),
        "ResidualGroup.forward: 2 in the loop, 1 around it, 2 groups",
        channel_dim=1,
    ),
    case(
        "looped",
        partial(handwritten_token_model, models.Looped, 1),
        token_inputs,
        (6,),
        "GPTBlock.forward: 2, called 3 times",
    ),
    case(
        "mid_chain_addition",
        gpt_blocks(models.PositionedBlock, 3),
        token_inputs,
        (6,),
        "GPTBlock.forward: 2, 3 blocks; the positions depend on no state",
    ),
    case(
        "all_states",
        lambda: models.AllStates(*(GPTBlock(32, 4) for _ in range(3))),
        token_inputs,
        (6,),
        "GPTBlock.forward: 2, 3 blocks",
    ),
    case(
        "rezero",
        gpt_blocks(models.ReZeroBlock, 3),
        token_inputs,
        (6,),
        "ReZeroBlock.forward: 2, 3 blocks",
    ),
    case(
        "in_place_alias",
        lambda: models.InPlaceAlias(InPlaceBlock(8), InPlaceBlock(8)),
        image_inputs,
        (4,),
        "InPlaceBlock.forward: 2, 2 blocks",
        channel_dim=1,
    ),
    case(
        "joint_streams",
        models.JointModel,
        two_token_inputs,
        (4, 4, 4),
        "JointBlock.forward: 2 per stream, 2 blocks; GPTBlock.forward: 2, 2 blocks",
    ),
)

EXTRA_CASES: tuple[Case, ...] = (
    *EXTRA_DECODERS,
    *EXTRA_ENCODERS,
    *EXTRA_TIMM,
    *EXTRA_HANDWRITTEN,
)
EXTRA_REFUSED: tuple[Case, ...] = (
    token_model(
        "bart",
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "vocab_size": 96,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 64,
        },
        make_inputs=t5_inputs,
        depths=(),
        refused="post-norm",
        counted_in="BartEncoderLayer.forward, BartDecoderLayer.forward: norm(residual + branch)",
    ),
    token_model(
        "albert",
        "AlbertModel",
        "AlbertConfig",
        {**SMALL, "embedding_size": 16},
        has_cache=False,
        depths=(),
        refused="post-norm",
        counted_in="AlbertAttention.forward, AlbertLayer.forward: LayerNorm(x + branch)",
    ),
    image_case(
        "timm_convmixer",
        convmixer,
        (),
        channel_dim=1,
        refused="sublayer",
        counted_in="convmixer.Residual.forward: 1, then a convolution over the sum ends the chain",
    ),
    case(
        "scaled_carrier",
        gpt_blocks(models.ScaledCarrierBlock, 2),
        token_inputs,
        (),
        "ScaledCarrierBlock.forward: `0.9 * x + branch`",
        refused="scale",
    ),
)
