"""Plans of small models: streams side by side, named alike, or written into."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attnres_compile
from attnres_compile.config import AttnResConfig
from attnres_compile.errors import NothingToConvertError

WIDTH = 8
X = torch.randn(2, 5, WIDTH)


class Layers(nn.Module):
    """Three layers of ``x + f(n(x))``, or of ``n(x + f(x))``."""

    def __init__(self, *, post_norm: bool = False) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.f = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.n = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for f, n in zip(self.f, self.n, strict=True):
            x = n(x + torch.tanh(f(x))) if self.post_norm else x + torch.tanh(f(n(x)))
        return x


class Two(nn.Module):
    """An encoder, of one stream or of two, and a decoder."""

    def __init__(self, *, post_norm: bool = False) -> None:
        super().__init__()
        self.encoder, self.between = Layers(post_norm=post_norm), nn.Linear(WIDTH, WIDTH)
        self.decoder = Layers(post_norm=post_norm)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.decoder(torch.tanh(self.between(self.encoder(x))))
        return result


def names(plan: attnres_compile.ConversionPlan) -> list[str]:
    return [stream.name for stream in plan.streams]


@pytest.mark.parametrize("option", [{"streams": ("decoder",)}, {"sites": ("decoder",)}])
def test_a_stream_of_deltas_may_be_left_out(option: dict[str, tuple[str, ...]]) -> None:
    config = AttnResConfig(delta_sources=True, **option)  # type: ignore[arg-type]
    plan = attnres_compile.plan(Two(post_norm=True), (X,), config=config)
    assert names(plan) == ["decoder"]
    assert {each.verdict for each in plan.why("encoder").explanations} == {"refused"}


class Outer(Layers):
    """A stream of its own, and another in a module of the name that such a one goes by."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stream = nn.Linear(WIDTH, WIDTH), Layers()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.stream(torch.tanh(self.stem(super().forward(x))))
        return result


def test_a_module_may_be_called_stream() -> None:
    plan = attnres_compile.plan(Outer(), (X,))
    assert sorted(names(plan)) == ["stream", "stream#2"]


class Parted(Layers):
    """A projection in its middle parts it into two streams."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.tanh(self.f[0](super().forward(x))))


def test_an_exclamation_mark_leaves_out_all_streams_of_a_module() -> None:
    model = Two()
    model.encoder = Parted()
    assert names(attnres_compile.plan(model, (X,))) == ["encoder", "encoder#2", "decoder"]
    for patterns, left in [
        (("!encoder",), ["decoder"]),
        (("encoder#2",), ["encoder#2"]),
        (("encoder", "!encoder#2"), ["encoder"]),
    ]:
        plan = attnres_compile.plan(model, (X,), config=AttnResConfig(streams=patterns))
        assert names(plan) == left


class Masked(Layers):
    """The carrier goes on by the name of a copy that was written into, or by what wrote."""

    def __init__(self, *, by_name: bool) -> None:
        super().__init__()
        self.by_name = by_name

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        states, hidden = [], x.sum(-1, keepdim=True) > 0
        y = torch.tanh(self.f[0](x))
        for f, n in zip(self.f, self.n, strict=True):
            y = y + torch.tanh(f(n(y)))
            states.append(y)
            copied = y.clone()
            written = copied.masked_fill_(hidden, 0.0)
            y = copied if self.by_name else written
        return states, y


def test_a_copy_that_is_written_into_and_goes_on_by_its_name_is_refused() -> None:
    config = AttnResConfig(delta_sources=True)
    with pytest.raises(NothingToConvertError, match="overwritten"):
        attnres_compile.convert(Masked(by_name=True), (X,), config=config)


def test_one_that_goes_on_by_what_wrote_is_converted() -> None:
    model, config = Masked(by_name=False).double(), AttnResConfig(delta_sources=True)
    converted = attnres_compile.convert(model, (X.double(),), config=config)
    assert attnres_compile.verify(model, converted, (X.double(),)).passed
