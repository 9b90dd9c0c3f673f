"""Why residual-looking additions are not converted; each reason with a negative twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from passes_helpers import ROUTES, Body, analyse, depths, images, refused, twice


def rotated(x: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat((-right, left), -1)


# The skip is altered: no operand carries the state that the branch depends on.

ALTERED: dict[str, tuple[str, Body]] = {
    "number": ("scaled-carrier", lambda m, x: 0.9 * x + m.f(x)),
    "number, skip on the right": ("scaled-carrier", lambda m, x: m.f(x) + x * 0.9),
    "division": ("scaled-carrier", lambda m, x: x / 2 + m.f(x)),
    "per channel": ("scaled-carrier", lambda m, x: m.scale * x + m.f(x)),
    "gate made in many steps": (
        "scaled-carrier",
        lambda m, x: (
            torch.sqrt(((-m.scale / 2).sigmoid() * (1 + m.scale.sigmoid())).clamp(1e-3)) * x
            + m.f(x)
        ),
    ),
    "alpha": ("scaled-carrier", lambda m, x: torch.add(m.f(x), x, alpha=0.5)),
    "negated": ("scaled-carrier", lambda m, x: -x + m.f(x)),
    "subtracted": ("subtracted-skip", lambda m, x: m.f(x) - x),
    "gate made of the data": (
        "gated-skip",
        lambda m, x: torch.sigmoid(m.g(x)) * x + m.f(m.norm(x)),
    ),
    "gate per token": ("gated-skip", lambda m, x: m.f(x) + x * m.g(x).mean(-1, keepdim=True)),
    "highway": (
        "gated-skip",
        lambda m, x: (g := torch.sigmoid(m.g(x))) * m.f(x) + (1 - g) * x,
    ),
    "dropout": ("dropout", lambda m, x: F.dropout(x, 0.1) + m.f(x)),
    "detached": ("detached-carrier", lambda m, x: x.detach() + m.f(x)),
    "rounding": ("narrowing-cast", lambda m, x: x.to(torch.bfloat16).float() + m.f(x)),
    "several": ("dropout", lambda m, x: F.dropout(0.9 * x, 0.1) + m.f(m.norm(x))),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("kind", "body"), ALTERED.values(), ids=ALTERED)
def test_an_altered_skip_is_refused(kind: str, body: Body, route: str) -> None:
    found = analyse(body, route=route)
    assert not found.streams
    assert refused(found) == [kind]


def fused(m: Any, x: Tensor) -> Tensor:
    flat = x.reshape(-1, 8)
    return torch.addmm(flat, m.norm(flat), m.f.weight)


FUSED: dict[str, Body] = {
    "matrix product": fused,
    "batched product": lambda m, x: torch.baddbmm(x, m.f(x), m.g.weight.expand(2, 8, 8)),
    "interpolation": lambda m, x: torch.lerp(x, m.f(m.norm(x)), 0.5),
    "interpolation, turned": lambda m, x: torch.lerp(m.f(m.norm(x)), x, 0.5),
    "sum of a stack": lambda m, x: torch.stack([x, m.f(m.norm(x))]).sum(0),
}
NOT_FUSED: dict[str, Body] = {
    "bias": lambda m, x: torch.addmm(m.scale, x.reshape(-1, 8), m.f.weight),
    "mask": lambda m, x: torch.baddbmm(m.positions.expand(2, 4, 8), m.f(x), m.g(x).mT @ m.h(x)),
    "token shift": lambda m, x: torch.lerp(x, torch.roll(x, 1, 1), 0.5),
    "two branches": lambda m, x: torch.stack([m.f(x), m.g(x)]).sum(0),
    "sum over tokens": lambda m, x: m.f(x).sum(0),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("body", FUSED.values(), ids=FUSED)
def test_an_addition_within_an_operator_is_refused(body: Body, route: str) -> None:
    assert refused(analyse(body, route=route)) == ["fused-addition"]


@pytest.mark.parametrize("body", NOT_FUSED.values(), ids=NOT_FUSED)
def test_what_is_no_addition_within_an_operator(body: Body) -> None:
    assert not refused(analyse(body))


@pytest.mark.parametrize("route", ROUTES)
def test_a_skip_that_is_a_factor_of_its_branch_is_refused(route: str) -> None:
    """As a factor it is a read, and as a skip it is none; apart from each other they are two."""

    def fused(m: Any, x: Tensor) -> Tensor:
        return torch.addcmul(x, x, m.f(m.norm(x)))

    def apart(m: Any, x: Tensor) -> Tensor:
        return x + x * m.f(m.norm(x))

    def other_factors(m: Any, x: Tensor) -> Tensor:
        return torch.addcmul(x, m.g(x), m.f(m.norm(x)))

    assert refused(analyse(twice(fused), route=route)) == ["skip-as-factor"] * 2
    for step in (apart, other_factors):
        found = analyse(twice(step), route=route)
        assert depths(found) == [2]
        assert not found.refusals


def mixing(m: Any, x: Tensor) -> Tensor:
    """A matrix that mixes the three streams of [batch, position, stream, channel] states."""
    return m.g(x.mean(2)).cumsum(-1)[..., :3].unsqueeze(-1).sigmoid() + m.memory[:3, :3]


def hyper_connection(m: Any, x: Tensor) -> Tensor:
    return m.f(x.sum(2)).unsqueeze(-2) + torch.matmul(mixing(m, x), x)


def by_einsum(m: Any, x: Tensor) -> Tensor:
    mixed = torch.einsum("bpij,bpjc->bpic", mixing(m, x), x)
    return mixed + m.f(x.sum(2)).unsqueeze(-2)


STREAMS: dict[str, tuple[Body, list[str]]] = {
    "hyper-connections": (hyper_connection, ["several-streams"] * 3),
    "by einsum": (by_einsum, ["several-streams"] * 3),
    "over attention's values": (lambda m, x: mixing(m, x) @ m.h(x) + m.f(m.h(x)), []),
    "over the channel": (lambda m, x: x @ m.g.weight + m.f(x), []),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("step", "kinds"), STREAMS.values(), ids=STREAMS)
def test_streams_that_are_mixed_between_additions(step: Body, kinds: list[str], route: str) -> None:
    """Three in a row are; one alone may be anything, and so may a product on the right."""
    x = torch.randn(2, 4, 3, 8)
    found = analyse(lambda m, x: step(m, step(m, step(m, x))), x, route=route)
    assert not found.streams
    assert refused(found) == kinds
    assert not refused(analyse(step, x, route=route))


def test_lists_of_additions_are_refused() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return torch._foreach_add([x, m.scale], [m.f(x), m.scale])[0]

    assert refused(analyse(body, route="dynamo")) == ["fused-addition"]


def shuffled(m: Any, x: Tensor) -> Tensor:
    """Channels change places, so that it is no other layout of the same state (`layouts`)."""
    x = x + m.f(m.norm(x))
    x = x.unflatten(2, (2, 4)).transpose(2, 3).flatten(2)
    return x + m.g(m.norm(x))


def without_the_first_token(m: Any, x: Tensor) -> Tensor:
    """Timesformer's: one of two attentions leaves the class token out."""
    tokens = x[:, 1:] + m.f(m.norm(x[:, 1:]))
    x = torch.cat((x[:, :1], tokens), 1)
    return x + m.g(m.norm(x))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("body", [shuffled, without_the_first_token])
def test_a_carrier_that_is_rearranged_between_additions(body: Body, route: str) -> None:
    found = analyse(body, route=route)
    assert not found.streams
    assert refused(found) == ["rearranged-carrier", "rearranged-carrier"]


def test_a_transposition_that_is_undone_is_no_rearrangement() -> None:
    def undone(m: Any, x: Tensor) -> Tensor:
        x = x + m.f(m.norm(x))
        x = x.transpose(1, 2).transpose(1, 2)
        return x + m.g(x)

    assert not refused(analyse(undone))


NOT_ALTERED: dict[str, Body] = {
    "rotary embedding": lambda m, x: m.scale * x + rotated(x) * m.scale,
    "token shift": lambda m, x: m.scale * x + torch.roll(x, 1, 1) * m.scale,
    "sum of two branches": lambda m, x: 0.9 * m.f(x) + m.g(x),
    "low-rank update": lambda m, x: m.f(x) + 2.0 * m.h(m.g(x)),
    "gate": lambda m, x: torch.sigmoid(x) * x + m.f(m.positions),
    "product of branches": lambda m, x: m.f(x) * m.g(x) + m.h(x),
    "gate over a branch": lambda m, x: torch.sigmoid(m.g(x)) * m.f(x) + m.h(x),
    "difference of branches": lambda m, x: m.f(x) - m.g(x),
    "difference of neighbours": lambda m, x: torch.roll(x, 1, 1) - x,
    "polynomial": lambda m, x: 0.5 * x + 0.044715 * torch.pow(x, 3),
}


@pytest.mark.parametrize("body", NOT_ALTERED.values(), ids=NOT_ALTERED)
def test_what_only_looks_altered_is_not_refused(body: Body) -> None:
    found = analyse(body)
    assert not found.streams
    assert not found.refusals


def test_an_altered_skip_ends_a_stream_and_may_begin_another() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        for scale in (0.9, 1.0):
            x = x + m.f(m.norm(x))
            x = x + m.g(m.norm(x))
            x = scale * x + m.h(m.norm(x)) if scale < 1 else x
        return x

    found = analyse(body)
    assert [len(stream.additions) for stream in found.streams] == [2, 2]
    assert refused(found) == ["scaled-carrier"]


# One addition between activations: a block of a ResNet whose neighbours are projected.


def test_a_lone_block_between_activations_is_post_activation() -> None:
    def between(m: Any, x: Tensor) -> Tensor:
        x = torch.relu(m.conv(x))
        x = torch.relu(x + m.conv(x))
        return m.conv(x) + m.conv(torch.relu(m.conv(x)))

    def before(m: Any, x: Tensor) -> Tensor:
        x = torch.relu(m.conv(x))
        x = x + m.conv(x)
        return m.conv(x) + m.conv(torch.relu(m.conv(x)))

    def after(m: Any, x: Tensor) -> Tensor:
        x = m.conv(x)
        x = torch.relu(x + m.conv(x))
        return m.conv(x) + m.conv(torch.relu(m.conv(x)))

    assert refused(analyse(between, images())) == ["post-activation"]
    assert refused(analyse(before, images())) == ["single-sublayer"]
    assert refused(analyse(after, images())) == ["single-sublayer"]


def test_a_refusal_says_where() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return 0.9 * x + m.f(x)

    (refusal,) = analyse(body, route="dynamo").refusals
    assert "the carrier is scaled" in refusal.reason
    assert refusal.source.startswith("test_explain_refusals.py:")


# Bodies of branches are not entered. (Those of loops: test_unroll_loops.py.)


def in_a_branch(m: Any, x: Tensor) -> Tensor:
    def one(x: Tensor) -> Tensor:
        return x + m.f(m.norm(x))

    return torch.cond(x.sum() > 0, one, lambda x: x.clone(), (x,))


@pytest.mark.parametrize("route", ["dynamo", "export"])
def test_an_addition_in_the_body_of_a_branch_is_refused(route: str) -> None:
    found = analyse(in_a_branch, route=route)
    assert not found.streams
    assert refused(found) == ["inner-graph"]
    assert "in the body of cond, which is not entered" in found.refusals[0].reason


# Streams of one sublayer: what on the carrier cuts them off from the others.


def cut_off(step: Body, route: str) -> list[str]:
    """What the reasons of one addition, a step, one addition, the step and two more say of it."""

    def body(m: Any, x: Tensor) -> Tensor:
        x = step(m, x + m.f(m.norm(x)))
        x = step(m, x + m.g(m.norm(x)))
        x = x + m.f(m.norm(x))
        return x + m.g(m.norm(x))

    found = analyse(body, torch.randn(2, 8, 8), route=route)
    assert depths(found) == [2]
    assert refused(found) == ["single-sublayer"] * 2
    return [refusal.reason.partition("; ")[2] for refusal in found.refusals]


CUTS: dict[str, tuple[str, Body]] = {
    "projection": ("linear", lambda m, x: m.h(x)),
    "projection, then a norm": ("linear", lambda m, x: m.norm(m.h(x))),
    "softmax": ("softmax", lambda m, x: x.softmax(1)),
    "shift": ("roll", lambda m, x: x.roll(1, 1)),
    "product with itself": ("matmul", lambda m, x: x @ x.mT),
}


@pytest.mark.parametrize("route", ["symbolic", "dynamo"])
@pytest.mark.parametrize(("name", "step"), CUTS.values(), ids=CUTS)
def test_what_cuts_a_single_sublayer_off_is_named(name: str, step: Body, route: str) -> None:
    for reason in cut_off(step, route):
        assert reason.startswith(f"'{name}' on the carrier at ")
        assert reason.endswith("cuts it off from other additions")
        assert route == "symbolic" or "test_explain_refusals.py:" in reason


def test_a_norm_between_a_stream_and_a_single_sublayer_is_named() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x = x + m.f(m.norm(x))
        x = m.norm(x + m.g(m.norm(x)))
        return x + m.f(x)

    found = analyse(body, route="export")
    assert depths(found) == [2]
    assert refused(found) == ["single-sublayer"]
    assert "; 'layer_norm' on the carrier at " in found.refusals[0].reason


def test_a_single_sublayer_that_is_alone_is_cut_off_by_nothing() -> None:
    def alone(m: Any, x: Tensor) -> Tensor:
        x = m.h(x)
        return m.h(x + m.f(m.norm(x)))

    def beside(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.h(x)
        z = m.g(x)
        return y + m.f(m.norm(y)), z + m.f(m.norm(z))

    for body in (alone, beside):
        reasons = {refusal.reason for refusal in analyse(body).refusals}
        assert reasons == {"a stream of one sublayer has nothing to choose from"}
