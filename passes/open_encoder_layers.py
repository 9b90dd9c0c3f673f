"""Open ``nn.TransformerEncoderLayer``'s fused call, so that its residual additions are seen.

In eval mode, where no gradient is wanted, that layer is one operator, which PyTorch chooses by a
global flag while the model is traced. Where this project traces, the flag is off; where a user's
own ``torch.compile`` traces, this pass writes the layer out as its other path would have.

Contract: the graph computes what the layer computes without the flag, from what the call carries:
GELU is the exact one, the hint that a mask is causal is not needed, and methods of a subclass are
passed over, as they are by the operator itself. Masks are added to scores; the operator takes them
for booleans instead, which is the same for masks of 0 and -inf.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.amp.autocast_mode import _enter_autocast

from attnres_compile.errors import CaptureError
from attnres_compile.passes.graph_editor import Editor

UNDER_AUTOCAST = (
    "nn.TransformerEncoderLayer was traced as one fused operator in a model that sets autocast "
    "itself, and cannot be written out there; call torch.backends.mha.set_fastpath_enabled("
    "False) before the model is compiled."
)

_FUSED = torch._transformer_encoder_layer_fwd
_KEY_PADDING = 1
"""The type of a mask [batch, tokens]; others broadcast to [batch, heads, tokens, tokens]."""


def open_encoder_layers(module: fx.GraphModule) -> int:
    """Opens every fused encoder layer of a graph from Dynamo, in place; returns how many.

    Raises:
        CaptureError: the graph sets autocast, under which example values are not known.
    """
    fused = module.graph.find_nodes(op="call_function", target=_FUSED)
    if fused and module.graph.find_nodes(op="call_function", target=_enter_autocast):
        raise CaptureError(UNDER_AUTOCAST)
    for node in fused:
        with module.graph.inserting_before(node):
            node.replace_all_uses_with(_layer(Editor(module.graph, node), *node.args))
        module.graph.erase_node(node)
    if fused:
        module.graph.lint()
        module.recompile()
    return len(fused)


def _layer(
    editor: Editor,
    x: fx.Node,
    width: int,
    heads: int,
    qkv_weight: fx.Node,
    qkv_bias: fx.Node,
    out_weight: fx.Node,
    out_bias: fx.Node,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    weight1: fx.Node,
    bias1: fx.Node,
    weight2: fx.Node,
    bias2: fx.Node,
    up_weight: fx.Node,
    up_bias: fx.Node,
    down_weight: fx.Node,
    down_bias: fx.Node,
    mask: fx.Node | None = None,
    mask_type: int | None = None,
) -> fx.Node:
    """The layer as additions of two sublayers, normed before or after; arguments as the call's."""
    call = editor.call

    def norm1(value: fx.Node) -> fx.Node:
        return call(F.layer_norm, value, (width,), weight1, bias1, eps)

    def norm2(value: fx.Node) -> fx.Node:
        return call(F.layer_norm, value, (width,), weight2, bias2, eps)

    def attention(value: fx.Node) -> fx.Node:
        qkv = call(F.linear, value, qkv_weight, qkv_bias)
        parts = call(torch.unflatten, qkv, -1, (3, heads, width // heads))
        by_head = call(torch.permute, parts, (2, 0, 3, 1, 4))
        q, k, v = (call(torch.select, by_head, 0, i) for i in range(3))
        attended = call(F.scaled_dot_product_attention, q, k, v, scores_mask)
        tokens = call(torch.transpose, attended, 1, 2)
        return call(F.linear, call(torch.flatten, tokens, 2), out_weight, out_bias)

    def mlp(value: fx.Node) -> fx.Node:
        hidden = call(F.linear, value, up_weight, up_bias)
        return call(F.linear, call(F.gelu if use_gelu else F.relu, hidden), down_weight, down_bias)

    scores_mask: Any = mask
    if mask is not None and mask_type == _KEY_PADDING:
        scores_mask = call(torch.unsqueeze, call(torch.unsqueeze, mask, 1), 1)
    if norm_first:
        x = call(torch.add, x, attention(norm1(x)))
        return call(torch.add, x, mlp(norm2(x)))
    x = norm1(call(torch.add, x, attention(x)))
    return norm2(call(torch.add, x, mlp(x)))
