"""Owners: the module that every call of which holds the planned streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnres_compile
from conversions import error, randomize

WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, linear in zip(self.norms, self.linears, strict=True):
            x = x + linear(norm(x))
        return x


class Shared(nn.Module):
    """One block, called in several places."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.other = Block(), Block()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)


class Outer(Shared):
    def forward(self, x: Tensor) -> Tensor:
        return self.block(x + self.linear(self.norm(self.block(x))))


class InAndOutOfAChain(Shared):
    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.norm(self.block(self.other(x))))


class OnItsOwn(Shared):
    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.norm(self.block(self.norm(x))))


@pytest.mark.parametrize(
    ("kind", "owners", "additions"),
    [(Outer, ["", ""], [3, 2]), (InAndOutOfAChain, ["", ""], [4, 2]), (OnItsOwn, ["block"], [2])],
)
def test_every_call_of_an_owner_holds_its_streams(
    kind: Any, owners: list[str], additions: list[int]
) -> None:
    model = kind().double()
    x = torch.randn(2, 4, WIDTH).double()
    converted = attnres_compile.convert(model, (x,))
    assert [stream.owner for stream in converted.plan.streams] == owners
    assert [len(stream.additions) for stream in converted.plan.streams] == additions
    assert error(converted(x), model(x)) < 1e-12
    randomize(converted)
    assert error(converted(x), model(x)) > 1e-3


class InPlace(nn.Module):
    """Writes its additions into what it is called with, and its caller reads them there."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.linears:
            x.add_(linear(x))
        return x.mean(1)


class Caller(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inside = nn.Linear(WIDTH, WIDTH), InPlace()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        mean: Tensor = self.inside(x)
        return x * mean[:, None]


def test_an_owner_holds_the_memory_that_its_stream_writes_into() -> None:
    model, x = Caller().double(), torch.randn(2, 4, WIDTH).double()
    converted = attnres_compile.convert(model, (x,))
    assert [stream.owner for stream in converted.plan.streams] == [""]
    assert error(converted(x), model(x)) < 1e-12
    alone = attnres_compile.plan(InPlace(), (x.float(),))
    assert not alone.streams
    assert "written in place into an input of the model" in alone.explain_refusals()


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_language_model_without_weights_is_planned_as_with_them(use_cache: bool) -> None:
    """On the meta device Dynamo cannot follow the empty tensors that a cache starts with."""
    from zoo_decoders import GPT2

    model = GPT2.build()
    planned = attnres_compile.plan(model, (), {"input_ids": torch.ones(2, 7, dtype=torch.long)})
    bare: Any = GPT2.build().to("meta")
    bare.config.use_cache = use_cache
    ids = torch.ones(2, 7, dtype=torch.long, device="meta")
    assert attnres_compile.plan(bare, (), {"input_ids": ids}).streams == planned.streams
    assert bare.config.use_cache is use_cache


class Decoder(nn.Module):
    """Adds what it is given, and a sublayer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, skipped: Tensor) -> Tensor:
        x = x + skipped
        return self.norm(x + self.linear(x))


class LongSkip(Shared):
    """What the decoder adds was made of what it adds it to, in the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Decoder()

    def forward(self, x: Tensor) -> Tensor:
        first = self.linear(x)
        return self.decoder(self.norm(self.block(first)).tanh(), first)


class Unrelated(LongSkip):
    """What the decoder adds are two things: the sum is the root of a stream of one sublayer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.norm(self.block(self.linear(x))), x.sum(1, keepdim=True) * 0 + 1)


class InnerSkip(LongSkip):
    """Branch and skip come from the decoder itself."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.linear(x))


def test_an_owner_holds_the_paths_that_make_its_additions_residual() -> None:
    """Run alone, the decoder could not tell that one of its arguments was made of the other."""
    model = LongSkip().double()
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    converted = attnres_compile.convert(model, (x,))
    found = [
        (s.owner, [a.module_path for b in s.blocks for sub in b for a in sub.additions])
        for s in converted.plan.streams
    ]
    assert ("", ["decoder", "decoder"]) in found
    assert error(converted(x), model(x)) < 1e-12
    report = attnres_compile.verify(model, converted, (x,))
    assert report.passed, report


@pytest.mark.parametrize(("kind", "owners"), [(InnerSkip, ["decoder"]), (Unrelated, ["block"])])
def test_an_owner_is_no_larger_than_its_paths(kind: Any, owners: list[str]) -> None:
    plan = attnres_compile.plan(kind(), (torch.randn(3, 5, WIDTH),))
    assert [stream.owner for stream in plan.streams] == owners


class Recurrent(Shared):
    """Its first round, and its last where `all_rounds`, run without gradients."""

    all_rounds = False
    shared = False

    def forward(self, x: Tensor) -> Tensor:
        first = self.block if self.shared else self.other
        with torch.no_grad():
            x = first(x)
        x = self.norm(x)
        with torch.set_grad_enabled(not self.all_rounds):
            return self.norm(self.block(x))


class Unrolled(Recurrent):
    shared = True


class Frozen(Recurrent):
    all_rounds = True


@pytest.mark.parametrize(
    ("kind", "owners", "refused"),
    [
        (Recurrent, ["block"], ["other"]),
        (Unrolled, ["block"], []),  # one set of queries, trained by the last round
        (Frozen, [], ["other", "block"]),
    ],
)
def test_a_stream_whose_queries_could_get_no_gradient(
    kind: Any, owners: list[str], refused: list[str]
) -> None:
    model, x = kind(), torch.randn(3, 5, WIDTH)
    plan = attnres_compile.plan(model, (x,))
    assert [stream.owner for stream in plan.streams] == owners
    assert [(each.kind, each.module_path) for each in plan.refusals] == [
        ("no-gradient", path) for path in refused for _ in range(2)
    ]
    if not owners:
        return
    converted = attnres_compile.convert(model, (x,))
    converted(x).square().sum().backward()
    new = [p for n, p in converted.named_parameters() if "attnres" in n]
    assert new
    assert all(p.grad is not None for p in new)


class Dead(Shared):
    """What is made of the third state and of those after it is not returned."""

    detached = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        state = x + self.linear(self.norm(x))
        unused = self.other(state)
        return x + unused.detach().sum() if self.detached else x.tanh()


class Detached(Dead):
    detached = True


class Alive(Dead):
    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return self.other(x + self.linear(self.norm(x)))


@pytest.mark.parametrize(
    ("kind", "left_out"),
    [
        (Dead, [False, False, False, True, True]),  # of five additions nothing reads the last
        (Detached, [False, False, False, True, True, True]),
        (Alive, [False] * 6),
    ],
)
def test_a_site_that_no_gradient_comes_back_to(kind: Any, left_out: list[bool]) -> None:
    """It reads the plain sum: invariant of a conversion, no parameter without a gradient."""
    model, x = kind().double(), torch.randn(3, 5, WIDTH, dtype=torch.float64)
    converted = attnres_compile.convert(model, (x,))
    (stream,) = converted.plan.streams
    assert [site.left_out for site in stream.sites] == left_out
    converted(x).square().sum().backward()
    new = [p for n, p in converted.named_parameters() if "attnres" in n]
    assert len(new) == 2 * (len(left_out) - 1 - sum(left_out))
    assert all(p.grad is not None for p in new)
    report = attnres_compile.verify(model, converted, (x,))
    assert report.passed, report
    said = "left out for want of a gradient" in " ".join(str(converted.plan).split())
    assert said == any(left_out)
    assert "the option sites" not in str(converted.plan)


def test_places_are_lines_of_the_model_and_not_of_ours() -> None:
    x = torch.randn(2, 3, WIDTH)
    (own,) = attnres_compile.plan(Block(), (x,)).streams
    assert {a.source.split(":")[0] for a in own.additions} == {"test_planning.py"}
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, norm_first=True)
    # Of what PyTorch itself computes, Dynamo names no line: the nearest would be our call of it.
    (library,) = attnres_compile.plan(nn.TransformerEncoder(layer, 2, None, False), (x,)).streams
    assert {a.source for a in library.additions} == {""}
