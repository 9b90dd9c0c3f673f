"""Models that attend over their own depth are recognised; other gatherings are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnres_compile.functional import attnres
from attnres_compile.passes.dataflow import Dataflow
from attnres_compile.passes.find_existing import find_existing
from passes_helpers import ROUTES, Body, refused_kinds, tokens, trace


def existing(body: Body, *inputs: Tensor, route: str = "symbolic") -> list[str]:
    return refused_kinds(find_existing(Dataflow.of(trace(body, *inputs, route=route).graph)))


def depth_attention(m: Any, x: Tensor) -> Tensor:
    """The sources are the stream at two depths."""
    sources = torch.stack([x, m.f(x)])
    scores = (m.norm(sources) * m.scale).sum(-1)
    return (scores.softmax(0).unsqueeze(-1) * sources).sum(0)


@pytest.mark.parametrize("route", ROUTES)
def test_attention_over_depth(route: str) -> None:
    assert existing(depth_attention, route=route) == ["already-attnres"]


def test_the_refusal_says_what_and_where() -> None:
    graph = trace(depth_attention, route="dynamo").graph
    (refusal,) = find_existing(Dataflow.of(graph))
    assert refusal.reason == (
        "the model has Attention Residuals already: it attends over outputs of its own depth"
    )
    assert refusal.source.startswith("test_find_existing.py:")


def with_einsum(m: Any, x: Tensor) -> Tensor:
    sources = torch.stack([x, m.f(x), m.g(x)], 2)
    scores = torch.einsum("d,btnd->btn", m.scale, m.norm(sources))
    return torch.einsum("btn,btnd->btd", scores.softmax(-1), sources)


def with_linear_scores(m: Any, x: Tensor) -> Tensor:
    sources = torch.stack([x, m.f(x)], 2)
    scores = F.linear(m.norm(sources), m.scale.unsqueeze(0))
    return (scores.softmax(2) * sources).sum(2)


def with_fused_attention(m: Any, x: Tensor) -> Tensor:
    sources = torch.stack([x, m.f(x)], 2)
    query = m.scale.expand(2, 4, 1, 8)
    return F.scaled_dot_product_attention(query, sources, sources)[:, :, 0]


def with_our_function(m: Any, x: Tensor) -> Tensor:
    return attnres([x, m.f(x)], m.scale)


@pytest.mark.parametrize("body", [with_einsum, with_linear_scores, with_fused_attention])
def test_other_spellings(body: Body) -> None:
    assert existing(body) == ["already-attnres"]


def test_our_own_operator() -> None:
    assert existing(with_our_function, route="dynamo") == ["already-attnres"]


def key_value_cache(m: Any, x: Tensor, past: Tensor) -> Tensor:
    """Keys of earlier tokens: neither of the gathered values depends on the other."""
    keys = torch.cat((past, m.g(x)), 1)
    return (m.f(x) @ keys.mT).softmax(-1) @ keys


def dense_net(m: Any, x: Tensor) -> Tensor:
    """What was gathered goes through a projection before anything is attended to."""
    gathered = torch.cat((x, m.f(x)), -1)
    y = F.linear(gathered, torch.cat((m.f.weight, m.g.weight), 1))
    return (y @ y.mT).softmax(-1) @ y


def classifier(m: Any, x: Tensor) -> Tensor:
    return torch.cat((m.f(x), m.g(x)), 1).mean(1).softmax(-1)


def independent_experts(m: Any, x: Tensor) -> Tensor:
    """Weighted outputs of branches that do not depend on each other."""
    outputs = torch.stack([m.f(x), m.g(x)], -1)
    return (outputs.sum(2, keepdim=True).softmax(-1) * outputs).sum(-1)


def class_token(m: Any, x: Tensor) -> Tensor:
    joined = torch.cat((m.positions[:1].expand(2, 1, 8), x), 1)
    return (m.f(joined) @ m.g(joined).mT).softmax(-1) @ m.h(joined)


def rotary(m: Any, x: Tensor) -> Tensor:
    left, right = m.f(x).chunk(2, -1)
    turned = torch.cat((-right, left), -1)
    return F.scaled_dot_product_attention(turned, turned, x)


def scalar_mixture(m: Any, x: Tensor) -> Tensor:
    """ELMo's weights of the layers are parameters; they do not attend to anything."""
    outputs = torch.stack([x, m.f(x)], -1)
    mixed = (m.scale[:2].softmax(0) * outputs).sum(-1)
    return (m.f(mixed) @ m.g(mixed).mT).softmax(-1)


@pytest.mark.parametrize(
    "body", [scalar_mixture, dense_net, classifier, independent_experts, class_token, rotary]
)
def test_other_gatherings(body: Body) -> None:
    assert existing(body) == []


def test_a_key_value_cache() -> None:
    assert existing(key_value_cache, tokens(), tokens()) == []
