"""Streams whose carrier is altered between additions: what is one, its states, and what is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnres_compile.passes.find_streams import find_streams
from attnres_compile.passes.streams import StreamAnalysis
from passes_helpers import (
    BREAKS,
    ROUTES,
    UNBROKEN,
    WIDTH,
    Body,
    depths,
    pre_norm,
    refused,
    site_depths,
    sublayers,
    tokens,
    trace,
    twice,
)


def analyse(body: Body | nn.Module, *inputs: Any, route: str = "symbolic") -> StreamAnalysis:
    return find_streams(trace(body, *inputs, route=route).graph, delta_sources=True)


# That graphs of torch.export are read alike shows in tests of other passes too.
EACH_ROUTE = [pytest.param(r, marks=pytest.mark.slow) if r == "export" else r for r in ROUTES]


def names(analysis: StreamAnalysis) -> list[list[tuple[int, str]]]:
    """Depth and operation of every state with a site, per stream; without the root."""
    return [
        [(s.depth, s.node.name.rstrip("_0123456789")) for s in stream.states[1:] if s.reads]
        for stream in analysis.streams
    ]


def rms_norm(m: Any, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * m.scale


def batch_norm(x: Tensor) -> Tensor:
    """Over the batch, with the channels turned to where batch norm wants them, and back."""
    return F.batch_norm(x.transpose(1, 2), None, None, training=True).transpose(1, 2)


# One step of a chain, twice: two sublayers, read at depths 0, 1 and 2.

STEPS: dict[str, Body] = {
    **BREAKS,
    "norm in steps": lambda m, x: rms_norm(m, x + m.f(x)),
    "norm in float64": lambda m, x: rms_norm(m, (x + m.f(x)).double()).float(),
    "turned for a norm and back": lambda m, x: batch_norm(x + m.f(x)),
    "flat for a norm": lambda m, x: m.norm((x + m.f(x)).view(-1, WIDTH)).view(2, 4, WIDTH),
    "norm, then activation": lambda m, x: F.gelu(m.norm(x + m.f(x))),
    "gate of the state itself": lambda m, x: F.silu(x + m.f(x)) * 0.5,
    "scaled and normed": lambda m, x: m.norm(1.7 * x + m.f(x)),
    "skip scaled by a number": lambda m, x: 0.9 * x + m.f(m.norm(x)),
    "skip scaled per channel": lambda m, x: m.f(m.norm(x)) + x * m.scale,
    "learned gate": lambda m, x: torch.sigmoid(m.scale) * x + m.f(x),
    "skip scaled by alpha": lambda m, x: torch.add(m.f(x), x, alpha=0.5),
    "skip with dropout": lambda m, x: F.dropout(x, 0.1) + m.f(x),
    "skip rounded": lambda m, x: x.to(torch.bfloat16).float() + m.f(x),
    "subtracted": lambda m, x: m.norm(x - m.f(x)),
    "gate of the state before": lambda m, x: torch.sigmoid(m.g(x)) * (x + m.f(x)),
    "activation in place": lambda m, x: F.relu(x + m.f(x), inplace=True),
}


@pytest.mark.parametrize("route", EACH_ROUTE)
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_two_steps_are_a_stream(step: Body, route: str) -> None:
    found = analyse(twice(step), route=route)
    assert sublayers(found) == [(1, 1)]
    assert site_depths(found) == [(0, 1, 2)]
    assert found.streams[0].deltas
    assert not found.refusals


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_without_the_option_they_are_refused_and_it_is_offered(step: Body) -> None:
    found = find_streams(trace(twice(step)).graph)
    assert not found.streams
    assert len(found.refusals) == 2
    assert all("delta_sources=True" in refusal.reason for refusal in found.refusals)


def test_the_states_are_what_is_read() -> None:
    """The norm's result, not the sum before it; a scaled sum itself."""
    assert names(analyse(twice(BREAKS["post-norm"]))) == [[(1, "norm"), (2, "norm")]]
    scaled = analyse(twice(STEPS["skip scaled by a number"]))
    assert names(scaled) == [[(1, "add"), (2, "add")]]


def test_every_value_on_the_way_that_is_read_is_a_state() -> None:
    def body(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + m.f(x)
        before = m.h(x)
        x = m.norm(x)
        x = x + m.g(x)
        return m.norm(x), before

    found = analyse(body)
    assert site_depths(found) == [(0, 1, 1, 2)]
    assert names(found) == [[(1, "add"), (1, "norm"), (2, "add")]]


def test_additions_without_a_read_between_are_one_sublayer() -> None:
    def parallel(m: Any, x: Tensor) -> Tensor:
        return m.norm(x + m.f(x) + m.g(x))

    found = analyse(twice(parallel))
    assert sublayers(found) == [(2, 2)]
    assert site_depths(found) == [(0, 2, 4)]


def test_pre_norm_layers_with_a_norm_after_each_are_one_stream() -> None:
    """The Conformer's: four sublayers, of which every second is followed by a norm."""
    found = analyse(twice(lambda m, x: m.norm(pre_norm(m, x))))
    assert depths(found) == [4]
    assert names(found) == [[(1, "add"), (2, "norm"), (3, "add"), (4, "norm")]]
    assert depths(find_streams(trace(twice(lambda m, x: m.norm(pre_norm(m, x)))).graph)) == [2, 2]


def test_a_final_norm_of_another_kind_is_a_reader() -> None:
    """What follows the last addition is the chain's only if it followed an earlier one."""

    def body(m: Any, x: Tensor) -> Tensor:
        x = F.relu(x + m.f(x))
        x = F.relu(x + m.g(x))
        x = x + m.h(x)
        return m.norm(x)

    assert names(analyse(body)) == [[(1, "relu"), (2, "relu"), (3, "add")]]


class FinalNormOutside(nn.Module):
    """Layers that norm their input, and the same norm once more, by the caller of all layers."""

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
            self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer, norm in zip(self.f, self.norms, strict=True):
                x = norm(x)
                x = x + layer(x)
            return x

    def __init__(self) -> None:
        super().__init__()
        self.layers = FinalNormOutside.Layers()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layers(x))


@pytest.mark.parametrize("route", ["dynamo", "export"])
def test_what_follows_outside_the_owner_is_a_reader(route: str) -> None:
    """The owner alone does not see it, and must come to the same states."""
    whole = analyse(FinalNormOutside(), tokens(), route=route)
    alone = analyse(FinalNormOutside().layers, tokens(), route=route)
    assert site_depths(whole) == site_depths(alone) == [(0, 1, 2, 3)]
    assert whole.streams[0].states[-1].addition is not None


def test_an_absorbed_addition_and_a_query_with_positions() -> None:
    """DETR's: positions are added to what attention reads, which is no successor of the state."""

    def step(m: Any, x: Tensor) -> Tensor:
        x = m.norm(x + m.f(x + m.positions))
        return m.norm(x + m.g(x))

    found = analyse(twice(step))
    assert depths(found) == [4]
    assert site_depths(found) == [(0, 1, 2, 3, 4)]


def test_lambdas_on_the_carrier_and_on_the_first_value() -> None:
    """nanochat's: before each layer the state is scaled, and the embedding added to it again."""

    def body(m: Any, x: Tensor) -> Tensor:
        first = m.norm(x)
        x = first
        for _ in range(2):
            x = 0.9 * x + 0.1 * first
            x = x + m.f(m.norm(x))
            x = x + m.g(m.norm(x))
        return m.norm(x)

    found = analyse(body)
    assert depths(found) == [4]
    assert site_depths(found) == [(0, 1, 2, 3, 4)]
    # at depth 2 what is read is the sum of the two, an addition that is no residual one
    assert [s.addition is None for s in found.streams[0].sites] == [True, False, True, False, False]


def test_plain_streams_stay_as_they_are() -> None:
    def nested(m: Any, x: Tensor) -> Tensor:
        x = pre_norm(m, x)
        y = F.relu(x)
        return pre_norm(m, x + m.h(m.norm(y)))

    for body in (pre_norm, nested, *map(twice, UNBROKEN.values())):
        graph = trace(body).graph
        plain, with_option = find_streams(graph), find_streams(graph, delta_sources=True)
        assert plain == with_option
        assert not any(stream.deltas for stream in with_option.streams)


def test_a_plain_successor_goes_before_an_altered_one() -> None:
    """A side chain that starts at an activated state does not take the chain with it."""

    def body(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + m.f(x)
        side = F.relu(x)
        side = side + m.h(side)
        x = x + m.g(x)
        return x, side

    found = analyse(body)
    assert [(stream.deltas, len(stream.additions)) for stream in found.streams] == [(False, 2)]
    assert refused(found) == ["single-sublayer"]


# Negative twins: alterations that differences could not follow, or that are none.


def moved(m: Any, x: Tensor) -> Tensor:
    return torch.roll(F.relu(x + m.f(x)), 1, 1)


def turned(m: Any, x: Tensor) -> Tensor:
    """Square, so that nothing but the order of the elements tells."""
    x = m.norm(x + m.f(x))
    return x.transpose(1, 2)


def joined(m: Any, x: Tensor) -> Tensor:
    x = m.norm(x + m.f(x))
    return torch.cat((x[:, 1:], x[:, :1]), 1)


def gated_by_itself(m: Any, x: Tensor) -> Tensor:
    return torch.sigmoid(m.g(x)) * x


NOT_FOLLOWED: dict[str, tuple[Body, list[str]]] = {
    "projection": (lambda m, x: m.norm(m.h(x + m.f(x))), ["single-sublayer"] * 2),
    "softmax over tokens": (lambda m, x: (x + m.f(x)).softmax(1), ["single-sublayer"] * 2),
    "moved along": (moved, ["single-sublayer"] * 2),
    "transposed": (turned, ["post-norm"] * 2),
    "joined anew": (joined, ["post-norm"] * 2),
    "gate of a projection": (
        lambda m, x: gated_by_itself(m, x + m.f(x)),
        ["scaled-carrier"] * 2,
    ),
    "skip with a gate of the data": (
        lambda m, x: torch.sigmoid(m.g(x)) * x + m.f(x),
        ["gated-skip"] * 2,
    ),
    "rotary embedding": (
        lambda m, x: m.scale * x + torch.cat((-x[..., 4:], x[..., :4]), -1) * m.scale,
        [],
    ),
    "token shift": (lambda m, x: m.scale * x + torch.roll(x, 1, 1) * m.scale, []),
    "polynomial": (lambda m, x: 0.5 * x + 0.044715 * torch.pow(x, 3), []),
    "sum of two branches": (lambda m, x: 0.9 * m.f(x) + m.g(x), []),
}


@pytest.mark.parametrize("route", EACH_ROUTE)
@pytest.mark.parametrize(("step", "kinds"), NOT_FOLLOWED.values(), ids=NOT_FOLLOWED)
def test_what_is_not_followed(step: Body, kinds: list[str], route: str) -> None:
    found = analyse(twice(step), torch.randn(2, WIDTH, WIDTH), route=route)
    assert not found.streams
    assert refused(found) == kinds


def test_an_inner_value_that_others_read_is_not_followed() -> None:
    def centred(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + m.f(x)
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        x = x * inverse
        return x + m.g(x), inverse

    found = analyse(centred)
    assert not found.streams
    assert refused(found) == ["post-norm"] * 2
    assert not any("delta_sources" in r.reason for r in find_streams(trace(centred).graph).refusals)


def test_one_sublayer_is_too_few() -> None:
    assert refused(analyse(BREAKS["post-norm"])) == ["single-sublayer"]
    between = twice(BREAKS["post-activation"])
    alone = analyse(lambda m, x: m.h(BREAKS["post-activation"](m, F.relu(x))))
    assert refused(alone) == ["single-sublayer"]
    assert depths(analyse(lambda m, x: m.h(between(m, F.relu(x))))) == [2]


@pytest.mark.parametrize("route", EACH_ROUTE)
def test_a_state_that_is_overwritten_is_refused(route: str) -> None:
    found = analyse(twice(lambda m, x: m.norm(x.add_(m.f(x)))), route=route)
    assert not found.streams
    assert refused(found) == ["overwritten"] * 2
    in_the_branch = analyse(twice(lambda m, x: m.norm(m.f(x).add_(x))), route=route)
    assert depths(in_the_branch) == [2]


def test_a_carrier_that_is_filled_in_place_is_none() -> None:
    """The write gives no value, and is still what the scaled carrier goes back to."""

    def filled(m: Any, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, 1:] = x[:, 1:]
        return y * 0.5 + m.f(x)

    assert not analyse(twice(filled), route="dynamo").streams


@pytest.mark.parametrize("route", EACH_ROUTE)
def test_several_results_of_an_operator_are_no_carrier(route: str) -> None:
    """Res2Net's groups of channels: each is added to what the one before became."""

    def grouped(m: Any, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        return torch.cat((m.f(first), m.g(second + m.f(first))), 1)

    assert not analyse(grouped, route=route).streams

    def within_a_group(m: Any, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        second = 0.9 * second + m.f(second)
        return torch.cat((first, 0.9 * second + m.g(second)), 1)

    assert depths(analyse(within_a_group, route=route)) == [2]
