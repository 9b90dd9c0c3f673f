"""Golden text of rewritten graphs, the partition of the sources, and what must not be touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor

from attnres_compile.config import AttnResConfig
from attnres_compile.errors import MismatchError
from attnres_compile.passes.find_streams import find_streams
from attnres_compile.passes.rewrite_residuals import MixLayout, rewrite_residuals
from passes_helpers import Body, images, tokens, trace
from rewriting_helpers import MIX, Rewritten, rewrite, run_both, text
from stream_bodies import BODIES, in_place_statements, nested, pre_norm
from tolerances import assert_matches


def test_golden_full() -> None:
    """Every sublayer is a source; the root is read as it is; no addition is left."""
    rewritten = rewrite(pre_norm)
    assert_expected_inline(
        text(rewritten.after.graph),
        """\
norm = self.norm(x)
f = self.f(norm)
mix_default = mix([x, f], query_0_1, gain_0_1, 1e-06, True, -1)
getitem = getitem(mix_default, 0)
norm_1 = self.norm(getitem)
g = self.g(norm_1)
mix_default_1 = mix([x, f, g], query_0_2, gain_0_2, 1e-06, True, -1)
getitem_1 = getitem(mix_default_1, 0)
norm_2 = self.norm(getitem_1)
h = self.h(norm_2)
return h""",
    )
    assert_expected_inline(str(dict(rewritten.inserted)), """{'mix': 2, 'getitem': 2}""")
    assert_expected_inline(str(rewritten.removed), """['add', 'add_1']""")


def test_golden_blocks() -> None:
    """Two sublayers per block: a partial sum is a source until its block is complete."""

    def body(m: Any, x: Tensor) -> Tensor:
        for layer in (m.f, m.g, m.h, m.f):
            x = layer(x) + x
        return x

    rewritten = rewrite(body, config=AttnResConfig(num_blocks=2, aggregate="mean"))
    assert_expected_inline(
        text(rewritten.after.graph),
        """\
f = self.f(x)
mix_default = mix([x, f], query_0_1, gain_0_1, 1e-06, False, -1)
getitem = getitem(mix_default, 0)
g = self.g(getitem)
add_tensor = add(f, g)
mix_default_1 = mix([x, add_tensor], query_0_2, gain_0_2, 1e-06, False, -1)
getitem_1 = getitem(mix_default_1, 0)
h = self.h(getitem_1)
mix_default_2 = mix([x, add_tensor, h], query_0_3, gain_0_3, 1e-06, False, -1)
getitem_2 = getitem(mix_default_2, 0)
f_1 = self.f(getitem_2)
add_tensor_1 = add(h, f_1)
mix_default_3 = mix([x, add_tensor, add_tensor_1], query_0_4, gain_0_4, 1e-06, False, -1)
getitem_3 = getitem(mix_default_3, 0)
return getitem_3""",
    )
    assert_expected_inline(str(dict(rewritten.inserted)), """{'mix': 4, 'getitem': 4, 'add': 2}""")


def test_golden_parallel_absorbed_and_scaled() -> None:
    """One sublayer of two additions, one of which is subtracted; then positions, absorbed."""

    def body(m: Any, x: Tensor) -> Tensor:
        n = m.norm(x)
        x = x + m.f(n) - m.g(n)
        x = x + m.positions
        return torch.add(x, m.h(m.norm(x)), alpha=0.5)

    rewritten = rewrite(body)
    assert_expected_inline(
        text(rewritten.after.graph),
        """\
norm = self.norm(x)
f = self.f(norm)
g = self.g(norm)
mul_tensor = mul(g, -1)
add_tensor = add(f, mul_tensor)
expand_as_default = expand_as(positions, x)
add_tensor_1 = add(add_tensor, expand_as_default)
mix_default = mix([x, add_tensor_1], query_0_3, gain_0_3, 1e-06, True, -1)
getitem = getitem(mix_default, 0)
norm_1 = self.norm(getitem)
h = self.h(norm_1)
mul_tensor_1 = mul(h, 0.5)
mix_default_1 = mix([x, add_tensor_1, mul_tensor_1], query_0_4, gain_0_4, 1e-06, True, -1)
getitem_1 = getitem(mix_default_1, 0)
return getitem_1""",
    )


# Every shape of a stream, evaluated: sources sum to the state, and zero queries change nothing.


def check(rewritten: Rewritten, *inputs: Tensor) -> None:
    run = run_both(rewritten, inputs)
    assert rewritten.sites
    assert len(run.source_sums) == len(rewritten.sites)
    for name, total, state in zip(rewritten.sites, run.source_sums, run.states, strict=True):
        assert_matches(total.view_as(state), state, name=f"sources of {name}")
    expected = torch.utils._pytree.tree_leaves(run.expected)
    for number, value in enumerate(torch.utils._pytree.tree_leaves(run.actual)):
        assert_matches(value, expected[number], name=f"output {number}")


@pytest.mark.parametrize("body", BODIES, ids=[body.__name__ for body in BODIES])
@pytest.mark.parametrize("num_blocks", [1, 2, "full"])
def test_sources_sum_to_the_state_and_zero_queries_change_nothing(
    body: Body, num_blocks: Any
) -> None:
    torch.set_default_dtype(torch.float64)
    x = tokens(dtype=torch.float64)
    check(rewrite(body, x, config=AttnResConfig(num_blocks=num_blocks)), x)


@pytest.mark.parametrize("route", ["dynamo", "export"])
@pytest.mark.parametrize("body", BODIES, ids=[body.__name__ for body in BODIES])
def test_every_route_gets_the_same_mixes(body: Body, route: str) -> None:
    expected = rewrite(body)
    rewritten = rewrite(body, route=route)
    assert rewritten.inserted["mix"] == len(rewritten.sites) == len(expected.sites)
    mixes = [node for node in rewritten.after.graph.nodes if node.target is MIX]
    others = [node for node in expected.after.graph.nodes if node.target is MIX]
    assert [len(m.args[0]) for m in mixes] == [len(m.args[0]) for m in others]


def test_mean_divides_by_the_number_of_sources() -> None:
    torch.set_default_dtype(torch.float64)
    x = tokens(dtype=torch.float64)

    def body(m: Any, x: Tensor) -> list[Tensor]:
        states = [x]
        for _ in range(3):
            states.append(states[-1] + F.normalize(m.f(m.norm(states[-1])), dim=-1))
        return states

    config = AttnResConfig(num_blocks="full", aggregate="mean")
    run = run_both(rewrite(body, x, config=config), [x])
    assert_matches(run.actual[0], x, name="root")
    for depth, total in enumerate(run.source_sums, start=1):
        assert_matches(run.actual[depth] * (depth + 1), total, name=f"depth {depth}")


def test_images_mix_over_dimension_one() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x = x + m.conv(F.relu(x))
        return x + m.conv(F.relu(x))

    rewritten = rewrite(body, images())
    mixes = [node for node in rewritten.after.graph.nodes if node.target is MIX]
    assert [node.args[5] for node in mixes] == [1, 1]


def test_mixed_dtypes() -> None:
    """Branches are cast to the state's dtype before they are summed, and so is the mix."""

    def body(m: Any, x: Tensor) -> Tensor:
        x = x.to(torch.bfloat16)
        x = x.float() + m.f(x.float()).to(torch.bfloat16)
        x = x + m.g(x)
        return x.double() + m.h(x).double()

    rewritten = rewrite(body, tokens())
    run = run_both(rewritten, [tokens()])
    assert [total.dtype for total in run.source_sums] == [
        torch.float32,
        torch.float32,
        torch.float64,
    ]
    assert run.actual.dtype == torch.float64
    for total, state in zip(run.source_sums, run.states, strict=True):
        assert_matches(total.float(), state.float(), name="state")  # the precision of branches


def test_new_nodes_say_where_they_come_from() -> None:
    rewritten = rewrite(pre_norm, route="dynamo")
    new = [node for node in rewritten.after.graph.nodes if node.target is MIX]
    for node in new:
        assert "stream_bodies.py" in node.meta["stack_trace"]
        assert "example_value" in node.meta
        assert "attnres_module_calls" in node.meta


def test_a_mix_without_a_reader_is_an_error() -> None:
    """As there would be if a read of an older name were not redirected first."""
    module = trace(lambda m, x, query: in_place_statements(m, x), tokens(), torch.zeros(8))
    (stream,) = find_streams(module.graph).streams
    query = module.graph.find_nodes(op="placeholder")[1]
    parameters = dict.fromkeys(range(1, 5), (query, None))
    layout = MixLayout((1, 1, 1, 1), True, 1e-6, -1)
    with pytest.raises(MismatchError, match=r"is read in a way that the rewrite could not follow"):
        rewrite_residuals(module.graph, stream, layout, parameters)


# What the rewrite must leave alone.


def test_only_additions_and_their_copies_are_erased() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x = x.double().contiguous() + m.f(x).double()
        unread = m.f.weight.clone()
        m.memory.index_copy_(0, torch.tensor([1]), m.positions[:1])
        assert unread is not None
        torch._check(x.shape[0] > 1)
        x = x.view(-1, 8) + m.g(x.float()).double().view(-1, 8)
        return x.view(2, 4, 8)

    rewritten = rewrite(body, route="dynamo")
    targets = {str(getattr(n.target, "__name__", n.target)) for n in rewritten.after.graph.nodes}
    assert "index_copy_" in targets
    assert "clone" in targets
    erased = [node for node in rewritten.before.graph.nodes if node.name in rewritten.removed]
    kinds = {str(getattr(node.target, "__name__", node.target)) for node in erased}
    assert kinds <= {"add", "view", "contiguous", "double"}
    assert "add" in kinds


def test_random_numbers_are_drawn_as_before() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x = x + F.dropout(m.f(x), 0.5)
        unused = F.dropout(x, 0.5)
        assert unused is not None
        return x + F.dropout(m.g(x), 0.5)

    x = tokens()
    rewritten = rewrite(body, x)
    torch.manual_seed(1)
    expected = rewritten.before(x, None)
    torch.manual_seed(1)
    assert_matches(rewritten.after(x, None), expected, name="output")


def test_a_graph_without_streams_stays_as_it_is() -> None:
    rewritten = rewrite(lambda m, x: m.f(x) + m.positions)
    assert text(rewritten.after.graph) == text(rewritten.before.graph)
    assert not rewritten.inserted
    assert not rewritten.removed


def test_gradients_reach_every_parameter_and_equal_those_before() -> None:
    torch.set_default_dtype(torch.float64)
    x = tokens(dtype=torch.float64)
    rewritten = rewrite(nested, x)
    parameters = list(rewritten.before.parameters())
    gradients = []
    for module in (rewritten.before, rewritten.after):
        loss = (module(x, None) ** 2).sum()
        gradients.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    for before, after in zip(*gradients, strict=True):
        assert (before is None) == (after is None)
        if before is not None:
            assert_matches(after, before, name="gradient", factor=10)
