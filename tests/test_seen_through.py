"""Whole models whose carrier is seen through something: counts, forward passes by hand, twins.

A dual path network cuts its carrier out of a concatenation; in a DaViT it is an image and tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnres_compile
from attnres_compile import AttnResConfig
from attnres_compile.capture import capture
from attnres_compile.planning import plan_of_capture
from conversions import randomize, sites_of
from oracle_mixer import BlockMixer, Mixing, OracleStream
from tolerances import relative_error
from zoo_case import perturb
from zoo_conversion import assert_everything_learns, assert_lossless, new_names, run

WIDTH, DENSE = 8, 4
TOLERANCE = 1e-10


class DualPathBlock(nn.Module):
    """Half of its result is added, the other half put beside what there is."""

    def __init__(self, dense: int, first: int = 0) -> None:
        super().__init__()
        self.carried = slice(first, first + WIDTH)
        self.norm = nn.BatchNorm2d(WIDTH + dense)
        self.conv = nn.Conv2d(WIDTH + dense, WIDTH + DENSE, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(torch.relu(self.norm(x)))
        rest = x[:, WIDTH:]
        return torch.cat([x[:, self.carried] + y[:, :WIDTH], rest, y[:, WIDTH:]], 1)


class DualPath(nn.Module):
    def __init__(self, blocks: int = 4, first: int = 0) -> None:
        super().__init__()
        self.residual, self.dense = nn.Conv2d(3, WIDTH, 3), nn.Conv2d(3, DENSE, 3)
        widths = [DENSE * (i + 1) for i in range(blocks)]
        self.blocks = nn.Sequential(*(DualPathBlock(width, first) for width in widths))
        self.head = nn.Linear(WIDTH + widths[-1] + DENSE, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(torch.cat([self.residual(x), self.dense(x)], 1))
        return self.head(x.mean((2, 3)))


def dual_path(model: Any, mixing: Mixing, images: Tensor) -> Tensor:
    """One sublayer a block; who reads the concatenation reads the mix in it."""
    counted = OracleStream("blocks", WIDTH, len(model.blocks), 1)
    stream = BlockMixer(counted, model.residual(images), mixing, {}, channel_dim=1)
    dense = [model.dense(images)]
    for block in model.blocks:
        x = torch.cat([stream.read(), *dense], 1)
        y = block.conv(torch.relu(block.norm(x)))
        stream.add(y[:, :WIDTH])
        dense.append(y[:, WIDTH:])
    return model.head(torch.cat([stream.read(), *dense], 1).mean((2, 3)))


class TwoLayoutsBlock(nn.Module):
    """A convolution of an image and a mixture of its tokens, in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def mixed(self, tokens: Tensor) -> Tensor:
        y = self.linear(self.norm(tokens))
        return torch.softmax(y @ y.transpose(1, 2), -1) @ y

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape
        x = x + self.conv(x)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.mixed(tokens)
        return tokens.transpose(1, 2).view(size)


class ScrambledBlock(TwoLayoutsBlock):
    """The same shapes, but elements of one image and channel become another's."""

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        x = x + self.conv(x)
        tokens = x.transpose(0, 1).reshape(batch, height * width, channels)
        tokens = tokens + self.mixed(tokens)
        return tokens.transpose(0, 1).reshape(x.shape)


class TwoLayouts(nn.Module):
    def __init__(self, block: type[nn.Module] = TwoLayoutsBlock, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3)
        self.blocks = nn.Sequential(*(block() for _ in range(blocks)))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).amax((2, 3)))


def two_layouts(model: Any, mixing: Mixing, images: Tensor) -> Tensor:
    """Two sublayers a block; sources are images, and only what reads tokens turns the mix."""
    root = model.stem(images)
    counted = OracleStream("blocks", WIDTH, len(model.blocks), 2)
    stream = BlockMixer(counted, root, mixing, {}, channel_dim=1)
    for block in model.blocks:
        stream.add(block.conv(stream.read()))
        tokens = stream.read().flatten(2).permute(0, 2, 1)
        stream.add(block.mixed(tokens).permute(0, 2, 1).reshape(root.shape))
    return model.head(stream.read().amax((2, 3)))


@dataclass(frozen=True)
class Case:
    """A model and what is counted by hand in its source.

    Attributes:
        sublayers: of its one stream, "blocks"; it is read before and after each.
        oracle: its forward pass with Attention Residuals.
        twin: a model of which nothing can be converted, and the kind of its refusals.
    """

    name: str
    make: Callable[[], nn.Module]
    sublayers: int
    oracle: Callable[..., Tensor]
    twin: Callable[[], nn.Module]
    refused: str

    def build(self) -> tuple[nn.Module, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = self.make().eval()
            perturb(model)
            inputs = torch.randn(2, 3, 8, 8)
        return model.double(), inputs.double()

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("dual path", DualPath, 4, dual_path, lambda: DualPath(first=1), "rearranged-carrier"),
    Case(
        "two layouts",
        TwoLayouts,
        4,
        two_layouts,
        lambda: TwoLayouts(ScrambledBlock),
        "rearranged-carrier",
    ),
]
by_case = pytest.mark.parametrize("case", CASES, ids=str)


@by_case
def test_counts_and_both_routes(case: Case) -> None:
    """A site at every depth, by both routes alike; two sublayers a block."""
    model, inputs = case.build()
    config = AttnResConfig(block_sublayers=2)
    plan = attnres_compile.plan(model, (inputs,), config=config)
    (stream,) = plan.streams
    assert not plan.refusals
    assert (stream.name, len(stream.sublayers)) == ("blocks", case.sublayers)
    assert (stream.width, stream.channel_dim) == (WIDTH, 1)
    depths = range(case.sublayers + 1)
    assert [site.depth for site in stream.sites] == [*depths]
    assert [site.num_sources for site in stream.sites] == [1 + (d + 1) // 2 for d in depths]
    exported = plan_of_capture(capture(model, (inputs,), route="export"), model, config)
    (other,) = exported.streams
    assert (other.name, other.owner, other.blocks) == (stream.name, stream.owner, stream.blocks)
    assert [(s.depth, s.state) for s in other.sites] == [(s.depth, s.state) for s in stream.sites]


@by_case
def test_lossless_and_stripped(case: Case) -> None:
    """Outputs and gradients at zero queries; then with random ones everything learns."""
    model, inputs = case.build()
    original = copy.deepcopy(model)
    converted: Any = attnres_compile.convert(model, (inputs,))
    expected = run(original, ((inputs,), {}))
    assert_lossless(run(converted, ((inputs,), {})), expected, TOLERANCE)
    stripped = attnres_compile.strip(converted).state_dict()
    assert all(torch.equal(a, original.state_dict()[name]) for name, a in stripped.items())
    randomize(converted)
    assert_everything_learns(run(converted, ((inputs,), {})), expected, new_names(converted.plan))


@by_case
@pytest.mark.parametrize("aggregate", ["sum", "mean"])
@pytest.mark.parametrize("block_sublayers", [1, 2, 3])
def test_random_queries_equal_the_forward_pass_by_hand(
    case: Case, aggregate: Any, block_sublayers: int
) -> None:
    """Outputs, gradients of all weights, and of all queries and gains."""
    compare(case, aggregate=aggregate, block_sublayers=block_sublayers)


@by_case
def test_sites_that_are_left_out_read_the_state(case: Case) -> None:
    model, inputs = case.build()
    (stream,) = attnres_compile.plan(model, (inputs,)).streams
    first = stream.sites[1].module_path
    compare(case, sites=(first,), block_sublayers=2)


def compare(case: Case, *, sites: tuple[str, ...] | None = None, **options: Any) -> None:
    model, inputs = case.build()
    config = AttnResConfig(sites=sites, **options)
    converted: Any = attnres_compile.convert(copy.deepcopy(model), (inputs,), config=config)
    randomize(converted)
    mixes = sites_of(converted)
    for site in mixes.values():
        site.query.requires_grad_()
        site.gain.requires_grad_()
    (stream,) = converted.plan.streams
    left_out = frozenset((stream.name, s.depth) for s in stream.sites if s.left_out)
    assert bool(left_out) == (sites is not None)
    expected = case.oracle(model, Mixing(mixes, left_out=left_out, **options), inputs)
    found = converted(inputs)
    assert relative_error(found, expected) <= TOLERANCE
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).double()
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for planned in (site for site in stream.sites if site.query_name and not site.left_out):
        site = mixes[stream.name, planned.depth]
        gradients |= {planned.query_name: site.query.grad, planned.gain_name: site.gain.grad}
    for name, gradient in gradients.items():
        assert gradient is not None, name
        actual = converted.get_parameter(name).grad
        scale = max(gradient.abs().max().item(), 1e-3)
        assert (actual - gradient).abs().max().item() <= TOLERANCE * scale, name


@by_case
def test_a_read_that_is_missed_is_noticed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative twin of the comparison: an oracle that reads one site less does not pass."""
    read = BlockMixer.read
    monkeypatch.setattr(
        BlockMixer, "read", lambda self: self._ordinary_sum if self.depth == 2 else read(self)
    )
    with pytest.raises(AssertionError):
        compare(case, block_sublayers=1)


@by_case
def test_the_twin_is_refused(case: Case) -> None:
    plan = attnres_compile.plan(case.twin(), (torch.randn(2, 3, 8, 8),))
    assert not plan.streams
    assert [refusal.kind for refusal in plan.refusals] == [case.refused] * case.sublayers
