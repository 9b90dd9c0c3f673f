"""Transpositions between residual additions: what is one stream, and where its channel is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnres_compile.passes.classify_readers import channel_dimension
from attnres_compile.passes.find_streams import find_streams
from attnres_compile.passes.layouts import inverse, turns_after
from passes_helpers import ROUTES, Body, analyse, depths, images, refused, site_depths, trace
from rewriting_helpers import rewrite, run_both
from tolerances import assert_matches


def tokens_of(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def image_of(x: Tensor) -> Tensor:
    return x.transpose(1, 2).unflatten(2, (6, 6))


def convolved(m: Any, x: Tensor) -> Tensor:
    return x + m.conv(x)


def mapped(m: Any, x: Tensor) -> Tensor:
    return x + m.f(m.norm(x))


def in_turns(m: Any, x: Tensor) -> Tensor:
    """Two layers of two sublayers; an image again at the end."""
    for _ in range(2):
        x = convolved(m, x)
        x = image_of(mapped(m, tokens_of(x)))
    return x


def channels_last(m: Any, x: Tensor) -> Tensor:
    """The same rank in both layouts, the channel first and last."""
    for _ in range(2):
        x = convolved(m, x).permute(0, 2, 3, 1)
        x = mapped(m, x).permute(0, 3, 1, 2)
    return x


def mostly_channels_last(m: Any, x: Tensor) -> Tensor:
    """One addition in the layout of the root, and readers and branches in the other."""
    x = convolved(m, x).permute(0, 2, 3, 1)
    for _ in range(4):
        x = mapped(m, x)
    return x * 1


def from_tokens(m: Any, x: Tensor) -> Tensor:
    """The root is in the layout of tokens, so that the channel is the last dimension."""
    x = tokens_of(m.conv(x))
    x = mapped(m, x)
    return tokens_of(convolved(m, image_of(x))) * 1


def copied(m: Any, x: Tensor) -> Tensor:
    x = tokens_of(convolved(m, x)).contiguous()
    x = mapped(m, x)
    return convolved(m, image_of(x).contiguous())


def turned_twice(m: Any, x: Tensor) -> Tensor:
    """By way of a third layout, in which nothing is read."""
    x = convolved(m, x).permute(2, 0, 1, 3).permute(1, 0, 3, 2)
    return mapped(m, x) * 1


JOINED: dict[str, tuple[Body, int, int]] = {
    "tokens and images": (in_turns, 4, 1),
    "channels last": (channels_last, 4, 1),
    "mostly channels last": (mostly_channels_last, 5, 1),
    "from tokens": (from_tokens, 2, -1),
    "copied": (copied, 3, 1),
    "turned twice": (turned_twice, 2, 1),
}
by_body = pytest.mark.parametrize(("body", "count", "channel"), JOINED.values(), ids=JOINED)


@pytest.mark.parametrize("route", ROUTES)
@by_body
def test_one_stream_in_two_layouts(body: Body, count: int, channel: int, route: str) -> None:
    found = analyse(body, images(), route=route)
    assert depths(found) == [count]
    assert not found.refusals
    assert channel_dimension(found.streams[0]) == channel


def test_every_read_is_of_a_state() -> None:
    """By the norm, and not by the transposition before it; the last one leads to no addition."""
    found = analyse(in_turns, images())
    assert site_depths(found) == [(0, 1, 2, 3, 4)]
    readers = [[read.user.name for read in site.reads] for site in found.streams[0].sites]
    assert readers == [["conv"], ["norm"], ["conv_1"], ["norm_1"], ["transpose_3"]]


def test_layouts_are_those_of_the_root_once_they_are_undone() -> None:
    (stream,) = analyse(in_turns, images()).streams
    turns = [[node.name for node in state.turns] for state in stream.states]
    assert turns == [[], [], ["transpose"], [], ["transpose_2"]]


@by_body
def test_sources_sum_to_the_state(body: Body, count: int, channel: int) -> None:
    """Each in the layout of the root; and zero queries change nothing."""
    rewritten = rewrite(body, images())
    run = run_both(rewritten, [images()])
    assert len(run.source_sums) == len(rewritten.sites) == count
    (shape,) = {tuple(total.shape) for total in run.source_sums}
    assert shape == ((2, 36, 8) if channel == -1 else (2, 8, 6, 6))
    for total, state in zip(run.source_sums, run.states, strict=True):
        assert_matches(total.flatten().sort()[0], state.flatten().sort()[0], name="elements")
    for actual, expected in zip(_leaves(run.actual), _leaves(run.expected), strict=True):
        assert_matches(actual, expected, name="output")


def _leaves(value: Any) -> list[Tensor]:
    return list(torch.utils._pytree.tree_leaves(value))


def test_a_transposition_that_nothing_reads_is_erased() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x = convolved(m, x)
        return x.transpose(1, 3).transpose(1, 3) + m.conv(x)

    rewritten = rewrite(body, images())
    assert not [name for name in rewritten.removed if name.startswith("conv")]
    assert {"add", "add_1", "transpose", "transpose_1"} <= {*rewritten.removed}


SCRAMBLED: dict[str, tuple[Body, str]] = {
    "batch and channel": (lambda x: x.transpose(0, 1).reshape(2, 36, 8), "rearranged-carrier"),
    "channel split": (
        lambda x: x.unflatten(1, (4, 2)).transpose(2, 3).reshape(2, 36, 8),
        "rearranged-carrier",
    ),
    "not all elements": (lambda x: tokens_of(x)[:, 1:], "rearranged-carrier"),
    "one element often": (lambda x: tokens_of(x)[:, :1].expand(2, 36, 8), "rearranged-carrier"),
    "the order of tokens": (lambda x: tokens_of(x).flip(1), "single-sublayer"),
}


@pytest.mark.parametrize(("scramble", "kind"), SCRAMBLED.values(), ids=SCRAMBLED)
@pytest.mark.parametrize("delta_sources", [False, True])
def test_what_is_no_layout_of_the_same_state(
    scramble: Body, kind: str, delta_sources: bool
) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return mapped(m, scramble(convolved(m, x))) * 1

    found = find_streams(trace(body, images()).graph, delta_sources=delta_sources)
    assert (depths(found), refused(found)) == ([], [kind, kind])


def test_a_layout_in_which_another_dimension_is_the_channel() -> None:
    """Convolutions over rows and columns, and a linear layer over rows alone."""

    def body(m: Any, x: Tensor) -> Tensor:
        return mapped(m, convolved(m, x).transpose(2, 3)) * 1

    def same(m: Any, x: Tensor) -> Tensor:
        return mapped(m, convolved(m, x).transpose(1, 3)) * 1

    square = torch.randn(2, 8, 8, 8)
    assert refused(analyse(body, square)) == ["rearranged-carrier"] * 2
    assert depths(analyse(same, square)) == [2]


def test_a_state_that_is_written_into_is_not_seen_through() -> None:
    """A reader might know it by a name that is older than what was written."""

    def after(m: Any, x: Tensor) -> Tensor:
        x = tokens_of(convolved(m, x))
        x.add_(m.f(m.norm(x)))
        return x * 1

    def before(m: Any, x: Tensor) -> Tensor:
        x = m.conv(x)
        x.add_(m.conv(x))
        return mapped(m, tokens_of(x.clone())) * 1

    for body in (after, before):
        assert depths(analyse(body, images())) == []


def test_chains_that_are_long_enough_stay_apart() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x = tokens_of(convolved(m, convolved(m, x)))
        return mapped(m, mapped(m, x)) * 1

    assert depths(analyse(body, images())) == [2, 2]


def test_a_long_chain_takes_a_short_one_in() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x = tokens_of(convolved(m, convolved(m, x)))
        return mapped(m, x) * 1

    assert depths(analyse(body, images())) == [3]


def test_of_two_that_follow_the_first_is_taken() -> None:
    """Readers of the other lie in a layout of their own, which tells where the channel is there."""

    def body(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        x = convolved(m, x)
        rows = x.transpose(1, 3)
        return mapped(m, tokens_of(x)) * 1, mapped(m, rows) * 1, m.f(rows), m.g(rows), m.h(rows)

    found = analyse(body, images())
    assert (depths(found), refused(found)) == ([2], ["single-sublayer"])
    assert channel_dimension(found.streams[0]) == 1


def test_with_delta_sources_it_is_a_plain_stream_or_none() -> None:
    def activated(m: Any, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.relu(convolved(m, x))
            x = torch.relu(image_of(mapped(m, tokens_of(x))))
        return x

    graph = trace(in_turns, images()).graph
    (stream,) = find_streams(graph, delta_sources=True).streams
    assert (len(stream.additions), stream.deltas) == (4, False)
    assert not find_streams(trace(activated, images()).graph, delta_sources=True).streams


def test_an_alteration_does_not_pass_a_turn() -> None:
    """Differences between states in two layouts would be of elements in different places."""

    def body(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        turn = tokens_of(convolved(m, x))
        x = 0.5 * turn + m.f(m.norm(turn))
        for layer in (m.g, m.h):
            x = 0.5 * x + layer(m.norm(x))
        return mapped(m, turn) * 1, x

    for stream in find_streams(trace(body, images()).graph, delta_sources=True).streams:
        layouts = {tuple(state.node.meta["val"].shape) for state in stream.states}
        assert stream.deltas == (layouts == {(2, 36, 8)})


def test_turns_that_undo_each_other() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        back = x.permute(0, 2, 3, 1).permute(0, 3, 1, 2)
        return back.permute(0, 2, 3, 1).transpose(1, 2)

    graph = trace(body, images()).graph
    there, back, again, other = [node for node in graph.nodes if node.op == "call_method"]
    assert turns_after((), [there, back]) == ()
    assert turns_after((there,), [back, again]) == (again,)
    assert turns_after((again,), [other]) == (again, other)
    assert inverse((0, 2, 3, 1)) == (0, 3, 1, 2)
