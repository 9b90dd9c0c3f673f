"""Whole models that loop over their layers in `scan` and `while_loop`: a forward pass by hand.

The hand-written forward passes loop in Python and read a mix before every layer. Each iteration is
one layer with sites of its own; a `while_loop` shares its layer's weights between them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops import while_loop
from torch._higher_order_ops.scan import scan

import attnres_compile
from attnres_compile import AttnResConfig
from attnres_compile.errors import NothingToConvertError
from conversions import randomize, sites_of
from looping_models import LAYERS, TOLERANCE, WIDTH, Layers, attention, build, feed_forward, norm
from oracle_mixer import BlockMixer, Mixing, OracleStream
from tolerances import relative_error
from zoo_conversion import assert_everything_learns, assert_lossless, new_names, run


class Scanned(Layers):
    """Stacked weights, as functional frameworks keep them."""

    def forward(self, x: Tensor) -> Tensor:
        def layer(x: Tensor, weights: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            x = x + attention(x, weights[0])
            x = x + feed_forward(x, weights[1])
            return x, x.new_zeros(())

        x, _ = scan(layer, self.embed(x), (self.first, self.second))
        return self.head(norm(x))


class Counted(Layers):
    """One layer, several times, as in a universal transformer."""

    def weights(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.first[0], self.second[0]

    def forward(self, x: Tensor) -> Tensor:
        def layer(i: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            x = x + attention(x, self.first[0])
            return i + 1, x + feed_forward(x, self.second[0])

        _, x = while_loop(lambda i, x: i < LAYERS, layer, (torch.tensor(0), self.embed(x)))
        return self.head(norm(x))


class UntilItSettles(Layers):
    """The twin: how deep the model is depends on the inputs."""

    def forward(self, x: Tensor) -> Tensor:
        def layer(x: Tensor) -> tuple[Tensor]:
            x = x + attention(x, self.first[0])
            return (x + feed_forward(x, self.second[0]),)

        (x,) = while_loop(lambda x: x.abs().amax() < 9, layer, (self.embed(x),))
        return self.head(norm(x))


class OverTokens(Layers):
    """The twin: one iteration a token."""

    def forward(self, x: Tensor) -> Tensor:
        def step(state: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
            state = state + feed_forward(state + token, self.first[0])
            return state, state.clone()

        tokens = self.embed(x).transpose(0, 1)
        return self.head(scan(step, torch.zeros_like(tokens[0]), tokens)[1])


def by_hand(model: Any, mixing: Mixing, x: Tensor) -> Tensor:
    counted = OracleStream("stream", WIDTH, LAYERS, 2)
    stream = BlockMixer(counted, model.embed(x), mixing, {}, channel_dim=-1)
    for layer in range(LAYERS):
        first, second = model.weights(layer)
        stream.add(attention(stream.read(), first))
        stream.add(feed_forward(stream.read(), second))
    return model.head(norm(stream.read()))


each_model = pytest.mark.parametrize("make", [Scanned, Counted])


@each_model
def test_counts(make: Callable[[], nn.Module]) -> None:
    """Two sublayers an iteration, each with a site before it, and one after the last."""
    model, x = build(make)
    plan = attnres_compile.plan(model, (x,))
    (stream,) = plan.streams
    assert not plan.refusals
    assert plan.num_residual_additions == 2 * LAYERS
    assert [site.depth for site in stream.sites] == [*range(2 * LAYERS + 1)]


@each_model
def test_lossless_and_stripped(make: Callable[[], nn.Module]) -> None:
    model, x = build(make)
    original = copy.deepcopy(model)
    converted: Any = attnres_compile.convert(model, (x,))
    expected = run(original, ((x,), {}))
    assert_lossless(run(converted, ((x,), {})), expected, TOLERANCE)
    stripped = attnres_compile.strip(converted).state_dict()
    assert all(torch.equal(a, original.state_dict()[name]) for name, a in stripped.items())
    randomize(converted)
    assert_everything_learns(run(converted, ((x,), {})), expected, new_names(converted.plan))


@each_model
@pytest.mark.parametrize("aggregate", ["sum", "mean"])
@pytest.mark.parametrize("block_sublayers", [1, 2, 4])
def test_random_queries_equal_the_forward_pass_by_hand(
    make: Callable[[], nn.Module], aggregate: Any, block_sublayers: int
) -> None:
    """Outputs, the gradients of all weights, and those of all queries and gains."""
    compare(make, aggregate, block_sublayers)


@each_model
def test_a_read_that_is_missed_is_noticed(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = BlockMixer.read
    monkeypatch.setattr(
        BlockMixer, "read", lambda self: self._ordinary_sum if self.depth == 2 else read(self)
    )
    with pytest.raises(AssertionError):
        compare(make, "sum", 1)


def compare(make: Callable[[], nn.Module], aggregate: Any, block_sublayers: int) -> None:
    model, x = build(make)
    config = AttnResConfig(aggregate=aggregate, block_sublayers=block_sublayers)
    converted: Any = attnres_compile.convert(copy.deepcopy(model), (x,), config=config)
    randomize(converted)
    mixes = sites_of(converted)
    for site in mixes.values():
        site.query.requires_grad_()
        site.gain.requires_grad_()
    mixing = Mixing(mixes, aggregate=aggregate, block_sublayers=block_sublayers)
    expected, found = by_hand(model, mixing, x), converted(x)
    assert relative_error(found, expected) <= TOLERANCE
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).double()
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    (stream,) = converted.plan.streams
    for planned in (site for site in stream.sites if site.query_name):
        site = mixes[stream.name, planned.depth]
        gradients |= {planned.query_name: site.query.grad, planned.gain_name: site.gain.grad}
    assert len(gradients) > 2 * 2 * LAYERS
    for name, gradient in gradients.items():
        actual = converted.get_parameter(name).grad
        scale = max(gradient.abs().max().item(), 1e-3)
        assert (actual - gradient).abs().max().item() <= TOLERANCE * scale, name


@each_model
def test_exports_and_programs_hold_the_same_function(make: Callable[[], nn.Module]) -> None:
    model, x = build(make)
    converted: Any = attnres_compile.convert(model, (x,))
    randomize(converted)
    program = attnres_compile.export(converted, (x,))
    assert relative_error(program.module()(x), converted(x)) <= TOLERANCE
    exported = torch.export.export(model, (x,), strict=False)
    of_program: Any = attnres_compile.convert(exported)
    assert relative_error(of_program.module()(x), model(x)) <= TOLERANCE
    planned = attnres_compile.plan(exported)
    assert planned.num_residual_additions == of_program.plan.num_residual_additions == 2 * LAYERS
    assert relative_error(exported.module()(x), model(x)) == 0  # planning changed nothing


@each_model
def test_the_backend_runs_it(make: Callable[[], nn.Module]) -> None:
    model, x = build(make)
    converted: Any = attnres_compile.convert(model, (x,))
    randomize(converted)
    compiled = torch.compile(converted, backend="attnres", fullgraph=True)
    assert relative_error(compiled(x), converted(x)) <= TOLERANCE
    assert converted(x[:, :3]).shape == (2, 3, 3)  # another length of the sequence


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (UntilItSettles, "a number of iterations that depends on the result of 'linear'"),
        (OverTokens, "runs over a dimension of the inputs"),
    ],
)
def test_the_twins_are_refused(make: Callable[[], nn.Module], reason: str) -> None:
    model, x = build(make)
    with pytest.raises(NothingToConvertError, match=reason):
        attnres_compile.convert(model, (x,))
