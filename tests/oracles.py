"""Block AttnRes forward passes of five models, written by hand and without the package.

Each oracle takes the original model, runs its branches by calling its own submodules in the
order of its source, and replaces every ``x = x + branch`` by ``stream.add(branch)`` and every
read of x by ``stream.read()``. The ``*_streams`` functions say what was counted by hand in the
source: name, layers and sublayers of each residual stream.

    Llama, GPT-2    x = x + attn(n(x)); x = x + mlp(n(x))     two sublayers a layer
    GPT-NeoX        x = x + (mlp(n(x)) + attn(n(x)))          one sublayer a layer
    T5              encoder: two sublayers a layer; decoder, with cross-attention: three
    ResNet          x = x + conv(n(...conv(n(x))))            one sublayer an identity block
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from handwritten_models import PreActivationBlock, PreActivationResNet
from oracle_mixer import BlockMixer, Mixing, OracleResult, OracleStream


def llama_streams(model: Any) -> list[OracleStream]:
    config = model.config
    return [OracleStream("model.layers", config.hidden_size, config.num_hidden_layers, 2)]


def llama_oracle(
    model: Any, mixing: Mixing, *, input_ids: Tensor, attention_mask: Tensor | None = None
) -> OracleResult:
    result = OracleResult()
    stack = model.model
    root = stack.embed_tokens(input_ids)
    mask = causal_mask(input_ids, attention_mask, root.dtype)
    rotary = stack.rotary_emb(root, position_ids=positions(input_ids))
    stream = BlockMixer(llama_streams(model)[0], root, mixing, result.reads)

    for layer in stack.layers:
        normed = layer.input_layernorm(stream.read())
        stream.add(layer.self_attn(normed, position_embeddings=rotary, attention_mask=mask)[0])
        normed = layer.post_attention_layernorm(stream.read())
        stream.add(layer.mlp(normed))

    result.outputs["logits"] = model.lm_head(stack.norm(stream.read()))
    return result


def gpt2_streams(model: Any) -> list[OracleStream]:
    config = model.config
    return [OracleStream("transformer.h", config.n_embd, config.n_layer, 2)]


def gpt2_oracle(
    model: Any, mixing: Mixing, *, input_ids: Tensor, attention_mask: Tensor | None = None
) -> OracleResult:
    result = OracleResult()
    stack = model.transformer
    # token plus position is a sum of two embeddings, not a residual addition: it is the root
    root = stack.drop(stack.wte(input_ids) + stack.wpe(positions(input_ids)))
    mask = causal_mask(input_ids, attention_mask, root.dtype)
    stream = BlockMixer(gpt2_streams(model)[0], root, mixing, result.reads)

    for layer in stack.h:
        stream.add(layer.attn(layer.ln_1(stream.read()), attention_mask=mask)[0])
        stream.add(layer.mlp(layer.ln_2(stream.read())))

    result.outputs["logits"] = model.lm_head(stack.ln_f(stream.read()))
    return result


def gpt_neox_streams(model: Any) -> list[OracleStream]:
    config = model.config
    return [OracleStream("gpt_neox.layers", config.hidden_size, config.num_hidden_layers, 1)]


def gpt_neox_oracle(
    model: Any, mixing: Mixing, *, input_ids: Tensor, attention_mask: Tensor | None = None
) -> OracleResult:
    assert model.config.use_parallel_residual
    result = OracleResult()
    stack = model.gpt_neox
    root = stack.emb_dropout(stack.embed_in(input_ids))
    mask = causal_mask(input_ids, attention_mask, root.dtype)
    rotary = stack.rotary_emb(root, position_ids=positions(input_ids))
    stream = BlockMixer(gpt_neox_streams(model)[0], root, mixing, result.reads)

    for layer in stack.layers:
        h = stream.read()  # one site: attention and feed-forward read the same state
        attention = layer.attention(
            layer.input_layernorm(h), attention_mask=mask, position_embeddings=rotary
        )[0]
        attention = layer.post_attention_dropout(attention)
        feed_forward = layer.post_mlp_dropout(layer.mlp(layer.post_attention_layernorm(h)))
        stream.add(feed_forward + attention)

    result.outputs["logits"] = model.lm_head(stack.final_layer_norm(stream.read()))
    return result


def t5_streams(model: Any) -> list[OracleStream]:
    config = model.config
    return [
        OracleStream("encoder.block", config.d_model, config.num_layers, 2),
        OracleStream("decoder.block", config.d_model, config.num_decoder_layers, 3),
    ]


def t5_oracle(
    model: Any,
    mixing: Mixing,
    *,
    input_ids: Tensor,
    decoder_input_ids: Tensor,
    attention_mask: Tensor | None = None,
) -> OracleResult:
    result = OracleResult()
    encoder_stream, decoder_stream = t5_streams(model)

    stack = model.encoder
    root = stack.dropout(stack.embed_tokens(input_ids))
    padding = padding_mask(attention_mask, root.dtype)
    bias = t5_position_bias(stack, input_ids)
    stream = BlockMixer(encoder_stream, root, mixing, result.reads)
    for block in stack.block:
        attention, feed_forward = block.layer
        stream.add(t5_attention(attention, "SelfAttention", stream.read(), padding, bias))
        stream.add(t5_feed_forward(feed_forward, stream.read()))
    encoded = stack.dropout(stack.final_layer_norm(stream.read()))

    stack = model.decoder
    root = stack.dropout(stack.embed_tokens(decoder_input_ids))
    causal = causal_mask(decoder_input_ids, torch.ones_like(decoder_input_ids), root.dtype)
    bias = t5_position_bias(stack, decoder_input_ids)
    stream = BlockMixer(decoder_stream, root, mixing, result.reads)
    for block in stack.block:
        attention, cross, feed_forward = block.layer
        stream.add(t5_attention(attention, "SelfAttention", stream.read(), causal, bias))
        stream.add(
            t5_attention(cross, "EncDecAttention", stream.read(), padding, None, memory=encoded)
        )
        stream.add(t5_feed_forward(feed_forward, stream.read()))
    decoded = stack.dropout(stack.final_layer_norm(stream.read()))

    if model.config.scale_decoder_outputs:
        decoded = decoded * model.model_dim**-0.5
    result.outputs["logits"] = model.lm_head(decoded)
    result.outputs["encoder_last_hidden_state"] = encoded
    return result


def t5_position_bias(stack: Any, input_ids: Tensor) -> Tensor:
    """The relative position bias: computed by the first block, shared by all of them."""
    length = input_ids.shape[1]
    return stack.block[0].layer[0].SelfAttention.compute_bias(length, length)


def t5_attention(
    layer: Any,
    name: str,
    h: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    memory: Tensor | None = None,
) -> Tensor:
    """The branch of a T5 attention layer, without its residual addition."""
    attention = getattr(layer, name)
    normed = layer.layer_norm(h)
    branch = attention(normed, mask=mask, position_bias=bias, key_value_states=memory)[0]
    return layer.dropout(branch)


def t5_feed_forward(layer: Any, h: Tensor) -> Tensor:
    """The branch of a T5 feed-forward layer, without its residual addition."""
    return layer.dropout(layer.DenseReluDense(layer.layer_norm(h)))


def preact_resnet_streams(model: PreActivationResNet) -> list[OracleStream]:
    """One stream a stage, over its identity blocks; a single addition is left as it is."""
    streams = []
    for index, stage in enumerate(model.stages):
        identity_blocks = [block for block in stage if block.projection is None]
        if len(identity_blocks) >= 2:
            channels = identity_blocks[0].conv_2.out_channels
            streams.append(OracleStream(f"stages.{index}", channels, len(identity_blocks), 1))
    return streams


def preact_resnet_oracle(
    model: PreActivationResNet, mixing: Mixing, *, images: Tensor
) -> OracleResult:
    """The roots are the stem's output and the sum that each projection block returns.

    A projection block carries no state over (its skip is projected), so that a new stream starts
    there: its addition is not a residual one, and what it reads is the old stream's last site.
    """
    result = OracleResult()
    streams = {stream.name: stream for stream in preact_resnet_streams(model)}
    x = model.stem(images)

    for index, stage in enumerate(model.stages):
        blocks = list(stage)
        if blocks[0].projection is not None:
            first = blocks.pop(0)
            activated = torch.relu(first.norm_1(x))
            x = preact_branch(first, activated) + first.projection(activated)
        name = f"stages.{index}"
        if name not in streams:
            for block in blocks:
                x = x + preact_branch(block, torch.relu(block.norm_1(x)))
            continue
        stream = BlockMixer(streams[name], x, mixing, result.reads, channel_dim=1)
        for block in blocks:
            stream.add(preact_branch(block, torch.relu(block.norm_1(stream.read()))))
        x = stream.read()  # the last site: the next stage, or the final norm, reads it

    pooled = torch.relu(model.norm(x)).mean((2, 3))
    result.outputs["logits"] = model.head(pooled)
    return result


def preact_branch(block: PreActivationBlock, activated: Tensor) -> Tensor:
    """The convolutions of a block, on its input after the first norm and activation."""
    return block.conv_2(torch.relu(block.norm_2(block.conv_1(activated))))


def positions(input_ids: Tensor) -> Tensor:
    return torch.arange(input_ids.shape[1]).unsqueeze(0)


def causal_mask(
    input_ids: Tensor, attention_mask: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """Additive mask [B, 1, S, S]; None without padding, where the attention is causal itself."""
    if attention_mask is None:
        return None
    length = input_ids.shape[1]
    not_later = torch.ones(length, length, dtype=torch.bool).tril()
    allowed = not_later & attention_mask.bool()[:, None, None, :]
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def padding_mask(attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Additive mask [B, 1, 1, S] for attention that looks both ways."""
    if attention_mask is None:
        return None
    padded = attention_mask[:, None, None, :] == 0
    return torch.zeros(padded.shape, dtype=dtype).masked_fill(padded, torch.finfo(dtype).min)


def count_parameters(streams: list[OracleStream]) -> int:
    """Every site but the root's has a query and a gain: 2 D for each residual addition."""
    return sum(2 * stream.channels * stream.sublayers for stream in streams)


__all__ = [
    "BlockMixer",
    "Mixing",
    "OracleResult",
    "OracleStream",
    "count_parameters",
    "gpt2_oracle",
    "gpt2_streams",
    "gpt_neox_oracle",
    "gpt_neox_streams",
    "llama_oracle",
    "llama_streams",
    "preact_resnet_oracle",
    "preact_resnet_streams",
    "t5_oracle",
    "t5_streams",
]
