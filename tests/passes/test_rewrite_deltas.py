"""Golden text of delta sources, what they sum to, and that the chain itself is left as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx

from attnres_compile.config import AttnResConfig
from attnres_compile.errors import MismatchError
from attnres_compile.passes import rewrite_deltas as rewriting
from attnres_compile.passes.find_streams import find_streams
from attnres_compile.passes.rewrite_residuals import MixLayout
from oracle_mixer import SiteParameters, mix
from passes_helpers import WIDTH, Body, images, pre_norm, tokens, trace, twice
from rewriting_helpers import MIX, Rewritten, rewrite, run_both, text
from tolerances import TOLERANCE, assert_matches, relative_error

FULL = AttnResConfig(num_blocks="full", delta_sources=True)
BLOCKS = AttnResConfig(block_sublayers=2, delta_sources=True)


def post_norm(m: Any, x: Tensor) -> Tensor:
    for layer in (m.f, m.g, m.h):
        x = m.norm(x + layer(x))
    return x


def test_golden_blocks() -> None:
    """Two sublayers in the first block, one in the second. The additions and norms stay."""
    rewritten = rewrite(post_norm, config=BLOCKS)
    assert_expected_inline(
        text(rewritten.after.graph),
        """\
f = self.f(x)
add = add(x, f)
norm = self.norm(add)
sub_tensor = sub(norm, x)
mix_default = mix([x, sub_tensor], query_0_2, gain_0_2, 1e-06, True, -1)
getitem = getitem(mix_default, 0)
g = self.g(getitem)
add_1 = add(norm, g)
norm_1 = self.norm(add_1)
sub_tensor_1 = sub(norm_1, x)
mix_default_1 = mix([x, sub_tensor_1], query_0_4, gain_0_4, 1e-06, True, -1)
getitem_1 = getitem(mix_default_1, 0)
h = self.h(getitem_1)
add_2 = add(norm_1, h)
norm_2 = self.norm(add_2)
sub_tensor_2 = sub(norm_2, norm_1)
mix_default_2 = mix([x, sub_tensor_1, sub_tensor_2], query_0_6, gain_0_6, 1e-06, True, -1)
getitem_2 = getitem(mix_default_2, 0)
return getitem_2""",
    )
    assert_expected_inline(str(dict(rewritten.inserted)), """{'sub': 3, 'mix': 3, 'getitem': 3}""")
    assert rewritten.removed == []


# Every shape of a chain, evaluated: sources sum to the state, and zero queries change nothing.


def relu_in_place(m: Any, x: Tensor) -> Tensor:
    """ResNet's: the sum and the activation in place, in the branch's memory."""
    x = m.conv(x)
    for _ in range(3):
        out = m.conv(F.relu(m.conv(x), inplace=True))
        out += x
        x = F.relu(out, inplace=True)
    return m.conv(x)


def read_by_an_old_name(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    for layer in (m.f, m.g, m.h):
        out = layer(x)
        kept = out
        out.add_(x)
        F.relu_(out)
        x = kept
    return kept, m.f(kept)


def copies_shared_by_skip_and_branch(m: Any, x: Tensor) -> Tensor:
    for layer in (m.f, m.g, m.h):
        x = m.norm(x + layer(x)).contiguous().clone()
    return x * 2


def views_shared_by_skip_and_branch(m: Any, x: Tensor) -> Tensor:
    for layer in (m.f, m.g, m.h):
        flat = x.reshape(-1, WIDTH)
        x = m.norm(flat + layer(flat)).view(2, 4, WIDTH)
    return x.sum(1)


def transposed_and_back_by_both(m: Any, x: Tensor) -> Tensor:
    for layer in (m.f, m.g, m.h):
        back = x.transpose(0, 1).transpose(0, 1)
        x = m.norm(back + layer(back))
    return x


def skip_widened(m: Any, x: Tensor) -> Tensor:
    """The carrier is float64 on its way, and every read of it too."""
    for layer in (m.f, m.g, m.h):
        wide = x.double()
        x = (wide + layer(wide.float())).relu().float()
    return x


def rounded(m: Any, x: Tensor) -> Tensor:
    """A last bit of difference can become one of bfloat16: the model itself is not continuous."""
    for layer in (m.f, m.g, m.h):
        x = (x + layer(x)).to(torch.bfloat16).float()
    return x


def scaled(m: Any, x: Tensor) -> Tensor:
    for layer in (m.f, m.g, m.h):
        x = m.scale * x + layer(m.norm(x))
    return m.norm(x)


def deep_norm(m: Any, x: Tensor) -> Tensor:
    for layer in (m.f, m.g, m.h):
        x = m.norm(1.7 * x + layer(x))
    return x


def norm_in_steps(m: Any, x: Tensor) -> Tensor:
    for layer in (m.f, m.g, m.h):
        x = x + layer(x)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * m.scale
    return x


def read_on_the_way(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    taps = []
    for layer in (m.f, m.g, m.h):
        x = x + layer(x)
        taps.append(x.sum(-1))
        x = m.norm(x)
    return x, torch.stack(taps)


def absorbed(m: Any, x: Tensor) -> Tensor:
    for layer in (m.f, m.g, m.h):
        x = m.norm(x + layer(x)) + m.positions
    return x


def parallel(m: Any, x: Tensor) -> Tensor:
    return twice(lambda m, x: m.norm(x + m.f(x) - m.g(x)))(m, x)


def lambdas(m: Any, x: Tensor) -> Tensor:
    x = first = m.norm(x)
    for layer in (m.f, m.g, m.h):
        x = 0.9 * x + 0.1 * first
        x = x + layer(m.norm(x))
    return m.norm(x)


def value_of_an_earlier_state(m: Any, x: Tensor) -> Tensor:
    states = [x]
    for layer in (m.f, m.g, m.h):
        states.append(m.norm(states[-1] + layer(states[-1]) * states[0]))
    return torch.stack(states)


def plain_in_the_branch(m: Any, x: Tensor) -> Tensor:
    return twice(lambda m, x: m.norm(x + m.h(pre_norm(m, m.f(x)))))(m, x)


def plain_from_a_state(m: Any, x: Tensor) -> Tensor:
    return twice(lambda m, x: m.norm(x + m.h(m.norm(pre_norm(m, x)))))(m, x)


def delta_in_the_branch_of_plain(m: Any, x: Tensor) -> Tensor:
    return twice(lambda m, x: x + m.h(post_norm(m, x)))(m, x)


def delta_in_the_branch_of_delta(m: Any, x: Tensor) -> Tensor:
    return twice(lambda m, x: m.norm(x + m.h(post_norm(m, x))))(m, x)


def delta_after_plain(m: Any, x: Tensor) -> Tensor:
    """The root of the second stream is what the first one's last mix became."""
    x = m.h(pre_norm(m, x))
    return m.h(post_norm(m, m.h(post_norm(m, x))))


# sublayers of each stream, in graph order
CHAINS: dict[str, tuple[Body, list[int]]] = {
    "post-norm": (post_norm, [3]),
    "read by an old name": (read_by_an_old_name, [3]),
    "copies": (copies_shared_by_skip_and_branch, [3]),
    "views": (views_shared_by_skip_and_branch, [3]),
    "transposed and back": (transposed_and_back_by_both, [3]),
    "widened": (skip_widened, [3]),
    "rounded": (rounded, [3]),
    "scaled": (scaled, [3]),
    "deep norm": (deep_norm, [3]),
    "norm in steps": (norm_in_steps, [3]),
    "read on the way": (read_on_the_way, [3]),
    "absorbed": (absorbed, [3]),
    "parallel": (parallel, [2]),
    "lambdas": (lambdas, [3]),
    "an earlier state": (value_of_an_earlier_state, [3]),
    "plain in the branch": (plain_in_the_branch, [2, 2, 2]),
    "plain from a state": (plain_from_a_state, [2, 2, 2]),
    "in the branch of plain": (delta_in_the_branch_of_plain, [2, 3, 3]),
    "in the branch of another": (delta_in_the_branch_of_delta, [2, 3, 3]),
    "after plain": (delta_after_plain, [2, 3, 3]),
}


def check(rewritten: Rewritten, x: Tensor, factor: float = 1.0) -> None:
    run = run_both(rewritten, [x])
    assert len(run.source_sums) == len(rewritten.sites) > 0
    for name, total, state in zip(rewritten.sites, run.source_sums, run.states, strict=True):
        assert_matches(total.view_as(state), state, name=f"sources of {name}")
    expected = torch.utils._pytree.tree_leaves(run.expected)
    for number, value in enumerate(torch.utils._pytree.tree_leaves(run.actual)):
        assert_matches(value, expected[number], name=f"output {number}", factor=factor)


@pytest.mark.parametrize(("body", "counts"), CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize("config", [FULL, BLOCKS], ids=["full", "blocks"])
def test_sources_sum_to_the_states_and_zero_queries_change_nothing(
    body: Body, counts: list[int], config: AttnResConfig
) -> None:
    dtype = torch.float32 if body in (skip_widened, rounded) else torch.float64
    torch.set_default_dtype(dtype)
    x = tokens(dtype=dtype)
    rewritten = rewrite(body, x, config=config)
    found = find_streams(rewritten.before.graph, delta_sources=True)
    assert [len(stream.sublayers) for stream in found.streams] == counts
    coarser = TOLERANCE[torch.bfloat16] / TOLERANCE[dtype]
    check(rewritten, x, coarser if body is rounded else 1.0)


def test_sources_of_a_resnet_sum_to_the_states() -> None:
    torch.set_default_dtype(torch.float64)
    x = images().double()
    check(rewrite(relu_in_place, x, config=BLOCKS), x)


@pytest.mark.parametrize("route", ["dynamo", pytest.param("export", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("body", "counts"), CHAINS.values(), ids=CHAINS)
def test_every_route_gets_the_same_mixes(body: Body, counts: list[int], route: str) -> None:
    expected = rewrite(body, config=BLOCKS)
    rewritten = rewrite(body, route=route, config=BLOCKS)
    assert rewritten.inserted["mix"] == len(rewritten.sites) == len(expected.sites)
    assert number_of_sources(rewritten) == number_of_sources(expected)


def number_of_sources(rewritten: Rewritten) -> list[int]:
    return [len(node.args[0]) for node in rewritten.after.graph.nodes if node.target is MIX]


def test_mean_divides_by_the_number_of_sources() -> None:
    torch.set_default_dtype(torch.float64)
    x = tokens(dtype=torch.float64)
    config = AttnResConfig(num_blocks="full", aggregate="mean", delta_sources=True)
    run = run_both(rewrite(value_of_an_earlier_state, x, config=config), [x])
    # the chain was computed from branches that read means, so only its own sums are its states
    assert_matches(run.actual[0], x, name="root")
    for depth, total in enumerate(run.source_sums, start=1):
        assert_matches(run.actual[depth] * (depth + 1), total, name=f"depth {depth}")


SAME_CHAIN = {
    post_norm: lambda x: x,
    copies_shared_by_skip_and_branch: lambda x: x * 2,
    views_shared_by_skip_and_branch: lambda x: x.sum(1),
    transposed_and_back_by_both: lambda x: x,
}


@pytest.mark.parametrize("body", SAME_CHAIN, ids=lambda body: body.__name__)
def test_random_queries_equal_a_forward_pass_by_hand(body: Any) -> None:
    """Branches read mixes, the skip reads states, also where both took one copy or view."""
    torch.set_default_dtype(torch.float64)
    x = tokens(dtype=torch.float64)
    rewritten = rewrite(body, x, config=BLOCKS)
    m: Any = rewritten.after
    queries = {n: q.copy_(torch.randn(WIDTH)) for n, q in m.named_buffers() if "query" in n}
    assert len(queries) == 3
    first, second, third = (SiteParameters(q, torch.ones(WIDTH)) for q in queries.values())

    y1 = m.norm(x + m.f(x))
    y2 = m.norm(y1 + m.g(mix([x, y1 - x], first, aggregate="sum", eps=1e-6)))
    y3 = m.norm(y2 + m.h(mix([x, y2 - x], second, aggregate="sum", eps=1e-6)))
    expected = mix([x, y2 - x, y3 - y2], third, aggregate="sum", eps=1e-6)

    assert_matches(m(x), SAME_CHAIN[body](expected), name="output")
    assert relative_error(m(x), rewritten.before(x)) > 1e-2


# Negative twins.


def wrong_start(writer: Any, edit: Any, state: fx.Node) -> fx.Node:
    """Every difference from the root, as if blocks were cumulative."""
    return edit.call(torch.ops.aten.sub.Tensor, state, writer._root)


def test_cumulative_differences_do_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float64)
    x = tokens(dtype=torch.float64)
    monkeypatch.setattr(rewriting._DeltaWriter, "_difference", wrong_start)
    with pytest.raises(AssertionError, match="sources of"):
        check(rewrite(post_norm, x, config=FULL), x)


def test_a_mix_without_a_reader_is_an_error() -> None:
    """As there would be if a read of an older name were not redirected first."""
    module = trace(lambda m, x, query: read_by_an_old_name(m, x), tokens(), torch.zeros(WIDTH))
    (stream,) = find_streams(module.graph, delta_sources=True).streams
    query = next(n for n in module.graph.nodes if n.name == "y")
    parameters = {p: (query, None) for p, state in enumerate(stream.states) if state.reads}
    layout = MixLayout((1, 1, 1), sums=True, eps=1e-6, channel_dim=-1)
    with pytest.raises(MismatchError, match="could not follow"):
        rewriting.rewrite_deltas(module.graph, stream, layout, parameters)
