"""Who reads a state, whether they see its scale, and which dimension is the channel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnres_compile.passes.classify_readers import Reader, channel_dimension, classify_readers
from attnres_compile.passes.find_streams import find_streams
from passes_helpers import ROUTES, WIDTH, Body, Branches, images, tokens, trace, twice


def readers_of_middle(read: Body, route: str = "symbolic") -> tuple[Reader, ...]:
    """The readers of the state between two sublayers, the second of which reads by `read`."""

    def body(m: Any, x: Tensor) -> Tensor:
        x = x + m.f(m.norm(x))
        return x + m.g(read(m, x))

    (stream,) = find_streams(trace(body, route=route).graph).streams
    return classify_readers(stream.states[1])


def rms_norm(m: Any, x: Tensor, eps: float = 1e-6) -> Tensor:
    return m.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def layer_norm(m: Any, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-5) + m.scale


def llama_norm(m: Any, x: Tensor) -> Tensor:
    before = x.dtype
    x = x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    return m.scale * (x * torch.rsqrt(variance + 1e-6)).to(before)


SCALE_INVARIANT = {
    "layer norm": lambda m, x: m.norm(x),
    "functional": lambda m, x: F.layer_norm(x, (8,)),
    "fused RMSNorm": lambda m, x: F.rms_norm(x, (8,)),
    "normalize": lambda m, x: F.normalize(x, dim=-1),
    "RMSNorm in steps": rms_norm,
    "Llama's": llama_norm,
    "LayerNorm in steps": layer_norm,
    "by standard deviation": lambda m, x: (x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + 1e-5),
    "by variance": lambda m, x: x * (x.var(-1, keepdim=True) + 1e-5) ** -0.5,
    "by norm": lambda m, x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True),
    "signs": lambda m, x: torch.sign(x),
    "behind a view": lambda m, x: m.norm(x.view(-1, 8)).view(2, 4, 8),
    "behind a cast": lambda m, x: m.norm(x.double().float()),
    "behind a constant factor": lambda m, x: m.norm(2 * x),
    "behind a slice": lambda m, x: m.norm(x[:, :1]).expand_as(x),
    "behind pooling": lambda m, x: m.norm(x.mean(1, keepdim=True)).expand_as(x),
    "behind dropout": lambda m, x: m.norm(F.dropout(x, 0.5)),
    "times an inverse": lambda m, x: x * (1 / (x.std(-1, keepdim=True) + 1e-5)),
    "by floored norm": lambda m, x: x / torch.linalg.vector_norm(x, 2, -1, True).clamp_min(1e-12),
    "by a general norm": lambda m, x: x / (torch.linalg.norm(x, dim=-1, keepdim=True) + 1e-6),
    "by the largest magnitude": lambda m, x: x / x.abs().amax(-1, keepdim=True).clamp_min(1e-6),
    "by the mean magnitude": lambda m, x: x / (x.abs().mean(-1, keepdim=True) + 1e-6),
    "beside its shape": lambda m, x: m.norm(x) + torch.zeros_like(x),
}
SEES_THE_SCALE = {
    "linear": lambda m, x: m.h(x),
    "activation": lambda m, x: torch.relu(x),
    "bias before the norm": lambda m, x: m.norm(x + m.scale),
    "large eps": lambda m, x: rms_norm(m, x, eps=0.5),
    "half a norm": lambda m, x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-6) ** -0.25,
    "only centred": lambda m, x: x - x.mean(-1, keepdim=True),
    "magnitude": lambda m, x: x.abs() - x.abs().amax(-1, keepdim=True),
    "softmax": lambda m, x: x.softmax(-1),
    "norm beside the state": lambda m, x: m.norm(x) + x,
    "activation before the norm": lambda m, x: m.norm(F.gelu(x)),
    "gate by the state": lambda m, x: m.norm(x) * x,
    "times what should be inverted": lambda m, x: x * (x.std(-1, keepdim=True) + 1e-5),
    "by a norm with a high floor": lambda m, x: (
        x / torch.linalg.vector_norm(x, 2, -1, True).clamp_min(0.5)
    ),
    "exponent from a tensor": lambda m, x: torch.pow(x, m.scale),
}


@pytest.mark.parametrize("read", SCALE_INVARIANT.values(), ids=SCALE_INVARIANT)
def test_readers_that_do_not_see_the_scale(read: Body) -> None:
    (reader,) = readers_of_middle(read)
    assert reader.scale_invariant
    assert reader.operation == "norm"


@pytest.mark.parametrize("read", SEES_THE_SCALE.values(), ids=SEES_THE_SCALE)
def test_readers_that_see_the_scale(read: Body) -> None:
    assert not all(reader.scale_invariant for reader in readers_of_middle(read))


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_agrees(route: str) -> None:
    for read in (lambda m, x: m.norm(x), llama_norm, layer_norm):
        assert all(reader.scale_invariant for reader in readers_of_middle(read, route))
    assert not any(r.scale_invariant for r in readers_of_middle(lambda m, x: m.h(x), route))


class Layer(nn.Module):
    """Reads its input in the norm, in a gate and by itself; the router reads the norm."""

    def __init__(self, normalisation: nn.Module) -> None:
        super().__init__()
        self.normalisation = normalisation
        self.gate = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.normalisation(x)) * torch.sigmoid(self.gate(x))


def test_readers_are_listed_per_module() -> None:
    model = nn.Sequential(Layer(nn.LayerNorm(WIDTH)), Layer(nn.LayerNorm(WIDTH)))
    (stream,) = find_streams(trace(model, tokens(), route="dynamo").graph).streams
    middle = classify_readers(stream.states[1])
    assert [(r.module_path, r.operation, r.scale_invariant) for r in middle] == [
        ("1.normalisation", "norm", True),
        ("1.gate", "linear", False),
    ]
    assert all(reader.source for reader in middle)
    (last,) = classify_readers(stream.states[2])
    assert (last.module_path, last.operation, last.scale_invariant) == ("", "output", False)


def test_batch_norm_is_no_scale_invariant_reader_in_either_mode() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(WIDTH)
            self.conv = nn.Conv2d(WIDTH, WIDTH, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(F.relu(self.bn(x)))

    for training in (True, False):
        for route in ROUTES:
            model = nn.Sequential(Block(), Block()).train(training)
            (stream,) = find_streams(trace(model, images(), route=route).graph).streams
            (reader,) = classify_readers(stream.states[1])
            assert not reader.scale_invariant
            assert reader.operation in ("batch_norm", "native_batch_norm")


# The channel dimension.


def channel(body: Body, *inputs: Tensor, route: str = "symbolic") -> int | None:
    (stream,) = find_streams(trace(Branches(body), *inputs, route=route).graph).streams
    return channel_dimension(stream)


def channels_last(m: Any, x: Tensor) -> Tensor:
    """ConvNeXt's form: a norm and linear layers over the last dimension of a turned image."""
    return x + m.f(m.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


def over_tokens(m: Any, x: Tensor) -> Tensor:
    """A linear layer over the tokens of 4 x WIDTH states."""
    return F.linear(x.mT, m.positions[:, :4]).mT


def shares(m: Any, x: Tensor) -> Tensor:
    """A weight for each of the three streams of [batch, position, stream, channel] states."""
    return m.g(x.mean(2))[..., :3].sigmoid().unsqueeze(-1)


def streams(m: Any, x: Tensor) -> Tensor:
    return x + shares(m, x) * m.f((shares(m, x) * x).sum(2)).unsqueeze(-2)


LAST = {
    "affine map and layer scale around a layer over tokens": (
        lambda m, x: x + m.scale * over_tokens(m, torch.addcmul(m.scale, m.scale, x)),
        tokens(),
    ),
    "linear": (lambda m, x: x + m.f(x), tokens()),
    "norm, then a shift": (lambda m, x: x + torch.roll(m.norm(x), 1, 1), tokens()),
    "RMSNorm in steps": (lambda m, x: x + torch.roll(rms_norm(m, x), 1, 1), tokens()),
    "matrix product": (lambda m, x: x + torch.relu(x) @ m.f.weight, tokens()),
    "no vote at all": (lambda m, x: x + x.cumsum(1), tokens()),
    "two dimensions": (lambda m, x: x + m.f(x), torch.randn(4, WIDTH)),
    "images of channels last": (lambda m, x: x + m.f(m.norm(x)), torch.randn(2, 6, 6, WIDTH)),
    "several streams": (streams, torch.randn(2, 4, 3, WIDTH)),
    "convolution over turned images": (
        lambda m, x: x + m.conv(torch.relu(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1),
        torch.randn(2, 6, 6, WIDTH),
    ),
}
FIRST = {
    "layer over tokens alone": (lambda m, x: x + over_tokens(m, x), tokens()),
    "scale of an image's channels": (
        lambda m, x: x + torch.roll(m.scale[:, None, None] * x, 1, 2),
        images(),
    ),
    "convolution": (lambda m, x: x + m.conv(F.relu(x)), images()),
    "group norm": (lambda m, x: x + torch.roll(F.group_norm(x, 2), 1, 2), images()),
    "linear over turned images": (channels_last, images()),
    "one-dimensional convolution": (
        lambda m, x: x + F.conv1d(x, m.f.weight.unsqueeze(-1)),
        torch.randn(2, WIDTH, 5),
    ),
}


@pytest.mark.parametrize(("step", "x"), LAST.values(), ids=LAST)
def test_channels_last(step: Body, x: Tensor) -> None:
    assert channel(twice(step), x) == -1


@pytest.mark.parametrize(("step", "x"), FIRST.values(), ids=FIRST)
def test_channels_first(step: Body, x: Tensor) -> None:
    assert channel(twice(step), x) == 1


@pytest.mark.parametrize("route", ROUTES)
def test_convolutions_without_a_batch_dimension(route: str) -> None:
    image = twice(lambda m, x: x + m.conv(F.relu(x)))
    assert channel(image, torch.randn(WIDTH, 6, 6), route=route) == 0
    assert channel(image, torch.randn(1, WIDTH, 6, 6), route=route) == 1
    signal = twice(lambda m, x: x + F.conv1d(F.relu(x), m.f.weight.unsqueeze(-1)))
    assert channel(signal, torch.randn(WIDTH, 6), route=route) == 0
    tokens = twice(lambda m, x: x + F.conv1d(F.relu(x).mT, m.f.weight.unsqueeze(-1)).mT)
    assert channel(tokens, torch.randn(6, WIDTH), route=route) == -1


def test_the_weights_of_streams_do_not_tell_the_channel() -> None:
    weighted = twice(lambda m, x: x + shares(m, x) * x.cumsum(1))
    assert channel(weighted, torch.randn(2, 4, 3, WIDTH)) is None


def test_no_vote_on_images_is_no_answer() -> None:
    assert channel(twice(lambda m, x: x + x.cumsum(2)), images()) is None


def test_the_mean_over_tokens_is_no_vote_and_a_norms_statistic_is_one() -> None:
    def pooled(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        read = m.norm(x)
        x = x + read.cumsum(1)
        y = x + x.cumsum(1)
        return y, x.mean(1), y.mean(dim=1)

    def centred(m: Any, x: Tensor) -> Tensor:
        return x + (x - x.mean(1, keepdim=True)).cumsum(2)

    assert channel(pooled, tokens()) == -1
    assert channel(twice(centred), tokens()) == 1


def test_a_tie_is_no_answer() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x = x + F.conv1d(x, m.f.weight.unsqueeze(-1))
        return x + m.g(x)

    assert channel(body, torch.randn(2, WIDTH, WIDTH)) is None


@pytest.mark.parametrize("route", ROUTES)
def test_the_channel_is_the_same_on_every_route(route: str) -> None:
    assert channel(twice(channels_last), images(), route=route) == 1
    assert channel(twice(lambda m, x: x + m.f(m.norm(x))), tokens(), route=route) == -1
