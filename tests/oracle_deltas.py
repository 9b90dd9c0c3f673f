"""Forward passes with delta sources, written by hand and without the package.

Each takes a model of which the state passes a norm, an activation or a scale between additions,
computes the states by the model's own operations with ``stream.state`` on the skip, and lets every
branch read ``stream.read()``:

    y_k = N(y_(k-1) + f(h_(k-1)))      h_k = mix of y_0, y_i - y_0, y_j - y_i, ..., y_k - y_j

where i, j, ... are the depths at which blocks end. One sublayer is one addition here.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracle_mixer import Mixing, OracleStream, mix


class DeltaMixer:
    """One stream in flight: `read` it, compute a branch, say what the state `becomes`, repeat."""

    def __init__(
        self, stream: OracleStream, root: Tensor, mixing: Mixing, *, channel_dim: int = -1
    ) -> None:
        self._name = stream.name
        self._mixing = mixing
        self._channel_dim = channel_dim
        self._ends = {0, *accumulate(mixing.block_sizes(stream))}
        self._states = [root]

    @property
    def state(self) -> Tensor:
        """The state itself, for the skip."""
        return self._states[-1]

    def becomes(self, state: Tensor) -> None:
        self._states.append(state)

    def read(self) -> Tensor:
        depth = len(self._states) - 1
        if depth == 0 or (self._name, depth) in self._mixing.left_out:
            return self.state
        bounds = sorted({end for end in self._ends if end < depth} | {depth})
        changes = [self._states[b] - self._states[a] for a, b in pairwise(bounds)]
        return mix(
            [self._states[0], *changes],
            self._mixing.sites[self._name, depth],
            aggregate=self._mixing.aggregate,
            eps=self._mixing.eps,
            channel_dim=self._channel_dim,
        )


def attention(part: Any, heads: int, h: Tensor) -> Tensor:
    """Self-attention with projections called query, key and value; without the one after it."""
    q, k, v = (
        projection(h).unflatten(-1, (heads, -1)).transpose(1, 2)
        for projection in (part.query, part.key, part.value)
    )
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def bert(model: Any, mixing: Mixing, ids: Tensor) -> dict[str, Tensor]:
    config = model.config
    name = OracleStream("encoder.layer", config.hidden_size, config.num_hidden_layers, 2)
    stream = DeltaMixer(name, model.embeddings(ids), mixing)
    for layer in model.encoder.layer:
        output = layer.attention.output
        attended = attention(layer.attention.self, config.num_attention_heads, stream.read())
        stream.becomes(output.LayerNorm(stream.state + output.dense(attended)))
        branch = layer.output.dense(layer.intermediate(stream.read()))
        stream.becomes(layer.output.LayerNorm(stream.state + branch))
    last = stream.read()
    return {"last_hidden_state": last, "pooler_output": model.pooler(last)}


def albert(model: Any, mixing: Mixing, ids: Tensor) -> dict[str, Tensor]:
    """One layer, applied several times: a site of its own for each application."""
    config = model.config
    (layer,) = model.encoder.albert_layer_groups[0].albert_layers
    path = "encoder.albert_layer_groups.0.albert_layers.0"
    name = OracleStream(path, config.hidden_size, config.num_hidden_layers, 2)
    root = model.encoder.embedding_hidden_mapping_in(model.embeddings(ids))
    stream = DeltaMixer(name, root, mixing)
    for _ in range(config.num_hidden_layers):
        part = layer.attention
        branch = part.dense(attention(part, config.num_attention_heads, stream.read()))
        stream.becomes(part.LayerNorm(stream.state + branch))
        branch = layer.ffn_output(layer.activation(layer.ffn(stream.read())))
        stream.becomes(layer.full_layer_layer_norm(stream.state + branch))
    last = stream.read()
    pooled = model.pooler_activation(model.pooler(last[:, 0]))
    return {"last_hidden_state": last, "pooler_output": pooled}


def transformer_encoder(
    model: nn.TransformerEncoder, mixing: Mixing, x: Tensor
) -> dict[str, Tensor]:
    stream = DeltaMixer(OracleStream("layers", x.shape[-1], len(model.layers), 2), x, mixing)
    for layer in model.layers:
        each: Any = layer
        h = stream.read()
        stream.becomes(each.norm1(stream.state + each.self_attn(h, h, h, need_weights=False)[0]))
        branch = each.linear2(F.relu(each.linear1(stream.read())))
        stream.becomes(each.norm2(stream.state + branch))
    assert model.norm is not None
    return {"": model.norm(stream.read())}


def resnet(model: Any, mixing: Mixing, images: Tensor) -> dict[str, Tensor]:
    """Bottleneck blocks; the first of each stage projects its skip, and a stream starts there."""
    x = model.maxpool(F.relu(model.bn1(model.conv1(images))))
    for number in (1, 2, 3, 4):
        first, *rest = getattr(model, f"layer{number}")
        x = first(x)
        if len(rest) < 2:
            for block in rest:
                x = block(x)
            continue
        name = OracleStream(f"layer{number}", x.shape[1], len(rest), 1)
        stream = DeltaMixer(name, x, mixing, channel_dim=1)
        for block in rest:
            branch = F.relu(block.bn1(block.conv1(stream.read())))
            branch = block.bn3(block.conv3(F.relu(block.bn2(block.conv2(branch)))))
            stream.becomes(F.relu(stream.state + branch))
        x = stream.read()
    return {"": model.fc(model.avgpool(x).flatten(1))}


class DeepNorm(nn.Module):
    """``y = LN(alpha * y + f(y))``, without a final norm."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.alpha = (2 * layers) ** 0.25
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))

    def forward(self, y: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            y = norm(y * self.alpha + layer(y))
        return y


def deep_norm(model: DeepNorm, mixing: Mixing, x: Tensor) -> dict[str, Tensor]:
    stream = DeltaMixer(OracleStream("stream", x.shape[-1], len(model.layers), 1), x, mixing)
    for layer, norm in zip(model.layers, model.norms, strict=True):
        stream.becomes(norm(model.alpha * stream.state + layer(stream.read())))
    return {"": stream.read()}


class GatedSkips(nn.Module):
    """Pre-norm with a learned gate per channel on each skip, and checkpointing if asked for."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.gates = nn.ParameterList(torch.rand(width) + 1 for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def parts(self) -> Iterator[tuple[nn.Module, Tensor]]:
        return zip(self.layers, self.gates, strict=True)

    def forward(self, x: Tensor) -> Tensor:
        for layer, gate in self.parts():
            x = torch.sigmoid(gate) * x + torch.tanh(layer(self.norm(x)))
        return self.norm(x)


def gated_skips(model: GatedSkips, mixing: Mixing, x: Tensor) -> dict[str, Tensor]:
    stream = DeltaMixer(OracleStream("stream", x.shape[-1], len(model.layers), 1), x, mixing)
    for layer, gate in model.parts():
        branch = torch.tanh(layer(model.norm(stream.read())))
        stream.becomes(torch.sigmoid(gate) * stream.state + branch)
    return {"": model.norm(stream.read())}


class Subtracted(nn.Module):
    """``y = f(y) - y``: the state changes its sign at every addition."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, y: Tensor) -> Tensor:
        for layer in self.layers:
            y = torch.tanh(layer(self.norm(y))) - y
        return self.norm(y)


def subtracted(model: Subtracted, mixing: Mixing, x: Tensor) -> dict[str, Tensor]:
    stream = DeltaMixer(OracleStream("stream", x.shape[-1], len(model.layers), 1), x, mixing)
    for layer in model.layers:
        stream.becomes(torch.tanh(layer(model.norm(stream.read()))) - stream.state)
    return {"": model.norm(stream.read())}


class Lambdas(nn.Module):
    """nanochat's: before each layer the state and the very first value are weighted anew."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.attention = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.mlp = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.of_state = nn.Parameter(torch.rand(layers) + 0.5)
        self.of_first = nn.Parameter(torch.rand(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.norm(x)
        for index, (attend, transform) in enumerate(zip(self.attention, self.mlp, strict=True)):
            x = self.of_state[index] * x + self.of_first[index] * first
            x = x + torch.tanh(attend(self.norm(x)))
            x = x + torch.tanh(transform(self.norm(x)))
        return self.norm(x)


def lambdas(model: Lambdas, mixing: Mixing, x: Tensor) -> dict[str, Tensor]:
    """The state after a layer is the weighted one: it is what the next layer reads."""
    layers = len(model.mlp)
    first = model.norm(x)
    weights = list(zip(model.of_state, model.of_first, strict=True))
    root = weights[0][0] * first + weights[0][1] * first
    stream = DeltaMixer(OracleStream("stream", x.shape[-1], layers, 2), root, mixing)
    for index in range(layers):
        branch = torch.tanh(model.attention[index](model.norm(stream.read())))
        stream.becomes(stream.state + branch)
        added = stream.state + torch.tanh(model.mlp[index](model.norm(stream.read())))
        if index + 1 < layers:
            of_state, of_first = weights[index + 1]
            added = of_state * added + of_first * first
        stream.becomes(added)
    return {"": model.norm(stream.read())}
