"""A value added at each layer together with the branch, as diffusion models add the time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnres_compile
from attnres_compile import AttnResConfig
from conversions import convert_randomized, sites_of
from oracle_mixer import BlockMixer, Mixing, OracleStream
from tolerances import relative_error

WIDTH = 8
LAYERS = 4
CONFIG = AttnResConfig(block_sublayers=2)
TOLERANCE = 1e-10


class Denoiser(nn.Module):
    """``x + t + f(norm(x), t)`` at every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.time = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, t = self.inner(x), self.time(t)
        for layer in self.layers:
            x = x + t + torch.tanh(layer(self.norm(x)) * t)
        return self.norm(x)


def by_hand(model: Denoiser, mixing: Mixing, x: Tensor, t: Tensor) -> Tensor:
    x, t = model.inner(x), model.time(t)
    mixer = BlockMixer(OracleStream("stream", WIDTH, LAYERS, 1), x, mixing, {})
    for layer in model.layers:
        mixer.add(t + torch.tanh(layer(model.norm(mixer.read())) * t))
    mixed: Tensor = model.norm(mixer.read())
    return mixed


def inputs(whole: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (2, 5 if whole else 1, WIDTH)
    x = torch.randn(2, 5, WIDTH, generator=generator, dtype=torch.float64)
    return x, torch.randn(sizes, generator=generator, dtype=torch.float64)


def worst_error(forward: Any, whole: bool) -> float:
    """Of the output and the gradients of all weights, queries and gains."""
    torch.manual_seed(0)
    model = Denoiser().double()
    x = inputs(whole)
    converted = convert_randomized(model, x, config=CONFIG)
    mixes = sites_of(converted)
    learned = [part.requires_grad_() for site in mixes.values() for part in site]
    expected = forward(model, Mixing(mixes, block_sublayers=2), *x)
    found = converted(*x)
    found.sin().sum().backward()
    weights = list(model.named_parameters())
    gradients = torch.autograd.grad(expected.sin().sum(), [*(p for _, p in weights), *learned])
    parameters = dict(converted.named_parameters())
    sites = [site for stream in converted.plan.streams for site in stream.sites if site.query_name]
    names = [name for name, _ in weights]
    names += [name for site in sites for name in (site.query_name, site.gain_name)]
    assert sorted(names) == sorted(parameters)
    pairs = [(parameters[n].grad, g) for n, g in zip(names, gradients, strict=True)]
    return max(relative_error(a, b) for a, b in [(found, expected), *pairs])


@pytest.mark.parametrize("whole", [False, True], ids=["broadcast", "whole"])
def test_random_queries_equal_the_forward_pass_by_hand(whole: bool) -> None:
    assert worst_error(by_hand, whole) <= TOLERANCE


def test_a_forward_pass_that_adds_it_to_the_root_alone_is_told_apart() -> None:
    def once(model: Denoiser, mixing: Mixing, x: Tensor, t: Tensor) -> Tensor:
        root, t = model.inner(x) + LAYERS * model.time(t), model.time(t)
        mixer = BlockMixer(OracleStream("stream", WIDTH, LAYERS, 1), root, mixing, {})
        for layer in model.layers:
            mixer.add(torch.tanh(layer(model.norm(mixer.read())) * t))
        mixed: Tensor = model.norm(mixer.read())
        return mixed

    assert worst_error(once, whole=True) > 1e-3


def test_it_starts_lossless_and_says_so() -> None:
    model, x = Denoiser().double(), inputs(whole=False)
    converted: Any = attnres_compile.convert(model, x, config=CONFIG)
    assert attnres_compile.verify(model, converted, x).passed
    assert converted.plan.num_residual_additions == LAYERS
    assert converted.plan.streams[0].root == "inner"
    told = {each.verdict for each in converted.plan.why().explanations}
    assert told == {"absorbed", "residual"}


class Parts(nn.Module):
    """The same where the time is added before the module is called that adds all the branches."""

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

        def forward(self, skip: Tensor, x: Tensor) -> Tensor:
            for layer in self.layers:
                skip = x = skip + torch.tanh(layer(x))
            return x

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.stack = nn.Linear(WIDTH, WIDTH), Parts.Stack()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.inner(x)
        mixed: Tensor = self.norm(self.stack(x + t, x))
        return mixed


def test_the_owner_holds_what_is_absorbed_too() -> None:
    model, x = Parts().double(), inputs(whole=False)
    converted: Any = attnres_compile.convert(model, x)
    assert [stream.owner for stream in converted.plan.streams] == [""]
    assert attnres_compile.verify(model, converted, x).passed
