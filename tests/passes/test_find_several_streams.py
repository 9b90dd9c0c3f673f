"""Graphs with more than one residual stream: which addition belongs to which."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from passes_helpers import analyse, depths, refused, site_depths, tokens, twice


def test_encoder_and_decoder_are_two_streams() -> None:
    def body(m: Any, x: Tensor, y: Tensor) -> Tensor:
        x = x + m.f(x)
        x = x + m.g(x)
        for _ in range(2):
            y = y + m.f(y)
            y = y + m.g(x)  # cross-attention, spelled so that it reads only the encoder
            y = m.h(y) + y
        return y

    found = analyse(body, tokens(), tokens())
    # What reads only the encoder is absorbed into the decoder's partial sum.
    assert depths(found) == [2, 4]
    assert [len(stream.states) for stream in found.streams] == [3, 7]


def test_interleaved_streams_are_told_apart() -> None:
    def body(m: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = x + m.f(x)
        y = m.f(y) + y
        x = m.g(x * y) + x
        y = y + m.g(y + x)
        return x, y

    found = analyse(body, tokens(), tokens())
    assert depths(found) == [2, 2]
    assert site_depths(found) == [(0, 1, 2), (0, 1, 2)]


def test_a_change_of_shape_starts_a_new_stream() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + m.f(x)
        x = x[:, :2] * 2
        for _ in range(3):
            x = x + m.f(x)
        return x

    assert depths(analyse(body)) == [2, 3]


def test_an_outer_skip_is_a_stream_of_its_own() -> None:
    def group(m: Any, x: Tensor) -> Tensor:
        y = x
        y = y + m.f(y)
        y = y + m.g(y)
        return x + m.h(y)

    once = analyse(group)
    assert depths(once) == [2]
    assert refused(once) == ["single-sublayer"]
    nested = analyse(twice(group))
    assert depths(nested) == [2, 2, 2]
    outer = nested.streams[0]
    assert outer.states[0].node.op == "placeholder"
    assert outer.states[-1].node is outer.additions[-1].node
    assert outer.states[-1].reads[0].user.op == "output"


def test_a_fork_continues_with_its_longest_arm() -> None:
    def body(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + m.f(x)
        a, b = x, x
        for _ in range(2):
            a = a + m.g(a)
        for _ in range(3):
            b = b + m.h(b)
        return a, b

    found = analyse(body)
    assert depths(found) == [4, 2]
    assert found.streams[1].states[0].node is found.streams[0].states[1].node
