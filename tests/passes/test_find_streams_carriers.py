"""What is transparent on the carrier of a stream, and what breaks it: refusals with reasons."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnres_compile.passes.find_streams import find_streams
from passes_helpers import (
    BREAKS,
    UNBROKEN,
    Body,
    analyse,
    depths,
    pre_norm,
    refused,
    site_depths,
    trace,
    twice,
)


def test_transparent_nodes_on_the_carrier() -> None:
    def casts(m: Any, x: Tensor) -> Tensor:
        x = x.to(torch.bfloat16)
        x = x.float() + m.f(x.float())
        return x.double() + m.g(x).double()

    def views(m: Any, x: Tensor) -> Tensor:
        flat = x.view(-1, 8) + m.f(x).view(-1, 8)
        x = flat.unflatten(0, (2, 4))
        return x + m.g(x)

    def copies(m: Any, x: Tensor) -> Tensor:
        x = x.contiguous() + m.f(x)
        return x.clone() + m.g(x)

    def transposed_and_back(m: Any, x: Tensor) -> Tensor:
        x = x + m.f(x)
        x = x.transpose(1, 2).permute(0, 2, 1)
        return x + m.g(x)

    for body in (casts, views, copies, transposed_and_back):
        found = analyse(body)
        assert depths(found) == [2], body.__name__
        assert site_depths(found) == [(0, 1, 2)], body.__name__


def test_a_whole_stream_may_lie_transposed() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return pre_norm(m, x).transpose(0, 1)

    assert depths(analyse(body)) == [2]


def test_a_reader_behind_a_transposition_reads_the_state() -> None:
    def body(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + m.f(m.positions * x)
        turned = x.transpose(1, 2)
        back = turned.transpose(1, 2)
        return back + m.g(m.norm(back)), turned.softmax(1)

    (stream,) = analyse(body).streams
    assert len(stream.states[1].reads) == 2


REASONS = {
    "post-norm": "post-norm: the carrier passes a norm between residual additions, so block sums "
    "do not add up to it",
    "post-activation": "post-activation: the carrier passes an activation between residual "
    "additions, so block sums do not add up to it",
    "dropout": "the carrier passes dropout between residual additions; dropout belongs on the "
    "branch",
    "narrowing-cast": "the carrier passes a narrowing cast between residual additions, which "
    "changes its value; keep the stream in one dtype",
    "scaled-carrier": "the carrier is scaled between residual additions, so block sums do not add "
    "up to it",
    "changed-carrier": "the carrier is changed between residual additions, so block sums do not "
    "add up to it",
}
OFFER = (
    "; AttnResConfig(delta_sources=True) converts it, with the differences that blocks make to the "
    "state as sources"
)


@pytest.mark.parametrize("kind", BREAKS)
def test_a_broken_carrier_is_refused_with_its_reason(kind: str) -> None:
    found = analyse(twice(BREAKS[kind]))
    assert depths(found) == []
    assert refused(found) == [kind, kind]
    assert found.refusals[0].reason == REASONS[kind] + OFFER


@pytest.mark.parametrize("step", UNBROKEN.values(), ids=UNBROKEN)
def test_the_same_on_the_branch_is_fine(step: Body) -> None:
    found = analyse(twice(step))
    assert depths(found) == [2]
    assert not found.refusals


def test_a_norm_in_elementary_operations_breaks_the_carrier_too() -> None:
    def rms_norm(m: Any, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * m.scale

    post = analyse(twice(lambda m, x: rms_norm(m, x + m.f(x))))
    assert refused(post) == ["post-norm", "post-norm"]
    pre = analyse(twice(lambda m, x: x + m.f(rms_norm(m, x))))
    assert depths(pre) == [2]


def test_one_sublayer_is_refused() -> None:
    def parallel(m: Any, x: Tensor) -> Tensor:
        return x + m.f(x) + m.g(x)

    def lone(m: Any, x: Tensor) -> Tensor:
        return x + m.f(x)

    found = analyse(parallel)
    assert refused(found) == ["single-sublayer", "single-sublayer"]
    assert found.refusals[0].reason == "a stream of one sublayer has nothing to choose from"
    assert refused(analyse(lone)) == ["single-sublayer"]


def test_an_addition_that_nothing_reads() -> None:
    """A symbolic trace keeps it."""

    def body(m: Any, x: Tensor) -> Tensor:
        x + m.f(x)
        return x

    assert refused(analyse(body)) == ["single-sublayer"]


def test_a_refusal_says_where() -> None:
    module = trace(lambda m, x: x + m.f(x), route="dynamo")
    (refusal,) = find_streams(module.graph).refusals
    assert refusal.source.startswith("test_find_streams_carriers.py:")
    assert refusal.module_path == ""
