"""Streams whose program writes in place: which state a name means, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from passes_helpers import (
    Body,
    analyse,
    depths,
    images,
    refused,
    twice,
)


def test_an_alias_read_after_an_in_place_addition_reads_the_later_state() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x = m.h(x)
        kept, flat = x, x.view(-1, 8)
        x.add_(m.f(x))
        middle = m.norm(flat)
        x.add_(m.g(x))
        return m.norm(kept) + middle.sum()

    (stream,) = analyse(body).streams
    assert [state.depth for state in stream.sites] == [0, 1, 2]
    assert [len(state.reads) for state in stream.states] == [1, 2, 1]


def test_a_copy_read_after_an_in_place_addition_reads_the_earlier_state() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x = m.h(x)
        kept = x.clone()
        x.add_(m.f(x))
        x.add_(m.g(x))
        return m.norm(x) + m.norm(kept).sum()

    (stream,) = analyse(body).streams
    assert [len(state.reads) for state in stream.states] == [2, 1, 1]


def test_a_state_overwritten_in_place_is_refused() -> None:
    def root_overwritten(m: Any, x: Tensor) -> Tensor:
        x = root = m.h(x)
        x = x + m.f(x)
        x = x + m.g(x)
        root.zero_()
        return m.norm(x)

    def branch_overwritten(m: Any, x: Tensor) -> Tensor:
        for layer in (m.f, m.g):
            branch = layer(x)
            branch.mul_(0.5)
            x = x + branch
        return m.norm(x)

    found = analyse(root_overwritten, route="dynamo")
    assert depths(found) == []
    assert refused(found) == ["overwritten", "overwritten"]
    line = r"the stream is overwritten in place by 'zero' at test_find_streams_in_place.py:"
    assert found.refusals[0].reason.startswith(line)
    assert found.refusals[0].reason.endswith("; make that operation out of place")
    assert depths(analyse(branch_overwritten)) == [2]


def test_what_is_written_before_the_stream_starts_is_a_part_of_its_root() -> None:
    def before(m: Any, x: Tensor) -> Tensor:
        x = m.h(x)
        x[:, 0] = 1.0
        x[:, 1:] += m.positions[1:]
        x.mul_(4.0)
        x[x < 0] = 0.0
        for layer in (m.f, m.g):
            x = x + layer(m.norm(x))
        return x

    def after(m: Any, x: Tensor) -> Tensor:
        root = m.h(x)
        x = root + m.f(m.norm(root))
        root[:, 0] = 1.0
        return x + m.g(m.norm(x))

    found = analyse(before, route="dynamo")
    assert depths(found) == [2]
    assert not found.refusals
    assert refused(analyse(after, route="dynamo")) == ["overwritten", "overwritten"]


def test_a_carrier_overwritten_between_additions_is_refused() -> None:
    def scaled(m: Any, x: Tensor) -> Tensor:
        x = x + m.f(x)
        x.mul_(0.5)
        return x + m.g(x)

    def activated(m: Any, x: Tensor) -> Tensor:
        x = x + m.f(x)
        return F.relu(x, inplace=True) + m.g(x)

    assert refused(analyse(scaled)) == ["scaled-carrier", "scaled-carrier"]
    assert refused(analyse(activated)) == ["post-activation", "post-activation"]


def scaled_copy(m: Any, x: Tensor) -> Tensor:
    skip = x.clone()
    skip.mul_(0.5)
    return skip + m.f(m.norm(x))


def scaled_itself(m: Any, x: Tensor) -> Tensor:
    x = m.h(x)
    branch = m.f(m.norm(x))
    x.mul_(0.5)
    return x + branch


def dropped_copy(m: Any, x: Tensor) -> Tensor:
    skip = x.clone()
    return F.dropout(skip, 0.1, inplace=True) + m.f(m.norm(x))


@pytest.mark.parametrize("route", ["symbolic", "dynamo"])
@pytest.mark.parametrize(
    ("step", "kind"),
    [
        (scaled_copy, "scaled-carrier"),
        (scaled_itself, "scaled-carrier"),
        (dropped_copy, "dropout"),
    ],
)
def test_a_skip_that_is_overwritten_before_the_addition_is_altered(
    step: Body, kind: str, route: str
) -> None:
    found = analyse(twice(step), route=route)
    assert not found.streams
    assert refused(found) == [kind, kind]


def test_a_copy_that_only_the_branch_overwrites_is_no_altered_skip() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        for _ in range(2):
            copy = x.clone()
            copy.mul_(0.5)
            x = x + m.f(m.norm(copy))
        return x

    assert depths(analyse(body, route="dynamo")) == [2]


def test_a_buffer_that_is_written_is_no_part_of_the_stream() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x = x + m.f(x)
        m.memory.copy_(x.detach().mean(0))
        return x + m.g(x)

    found = analyse(body, route="dynamo")
    assert depths(found) == [2]
    assert not found.refusals


def test_images_are_streams_too() -> None:
    found = analyse(twice(lambda m, x: x + m.conv(F.relu(x))), images())
    assert depths(found) == [2]


def test_an_older_view_of_another_shape_read_after_an_in_place_addition_is_refused() -> None:
    def through(view: Body) -> Body:
        def body(m: Any, x: Tensor) -> Tensor:
            x = m.h(x)
            older = view(m, x)
            x.add_(m.f(x))
            read = older.softmax(-1).sum()
            x.add_(m.g(x))
            return m.norm(x) + read

        return body

    for view in (
        lambda m, x: x[:, 0],
        lambda m, x: x.transpose(1, 2),
        lambda m, x: x.narrow(1, 0, 2),
    ):
        assert refused(analyse(through(view))) == ["overwritten", "overwritten"]
    for view in (lambda m, x: x, lambda m, x: x.view(-1, 8), lambda m, x: x[:, 0].clone()):
        assert depths(analyse(through(view))) == [2]


def test_a_branch_overwritten_after_its_addition_is_refused() -> None:
    def after(m: Any, x: Tensor) -> Tensor:
        branch = m.f(x)
        x = x + branch
        read = m.norm(x)
        branch.zero_()
        return x + m.g(read)

    def before(m: Any, x: Tensor) -> Tensor:
        branch = m.f(x)
        branch.mul_(m.scale)
        x = x + branch
        return x + m.g(m.norm(x))

    found = analyse(after, route="dynamo")
    assert refused(found) == ["overwritten", "overwritten"]
    assert "by 'zero' at test_find_streams_in_place.py:" in found.refusals[0].reason
    assert depths(analyse(before)) == [2]


def test_a_reader_may_write_into_what_it_reads() -> None:
    def by_the_new_name(m: Any, x: Tensor) -> Tensor:
        x = m.h(x)
        x += m.f(m.norm(x))
        x += m.g(m.norm(x))
        return F.relu(x, inplace=True)

    def by_an_old_name(m: Any, x: Tensor) -> Tensor:
        x = m.h(x)
        x.add_(m.f(m.norm(x)))
        x.add_(m.g(m.norm(x)))
        F.relu(x, inplace=True)
        return m.norm(x)

    assert depths(analyse(by_the_new_name, route="dynamo")) == [2]
    # After the rewrite the old name is the root, into which the activation writes no more.
    assert refused(analyse(by_an_old_name, route="dynamo")) == ["overwritten", "overwritten"]
