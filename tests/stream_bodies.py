"""Every shape of a residual stream, as forward passes of `Branches`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from passes_helpers import Body


def pre_norm(m: Any, x: Tensor) -> Tensor:
    x = x + m.f(m.norm(x))
    x = x + m.g(m.norm(x))
    return m.h(m.norm(x))


def in_place(m: Any, x: Tensor) -> Tensor:
    x = m.h(x)
    kept, flat = x, x.view(-1, 8)
    x.add_(m.f(m.norm(x)))
    middle = m.norm(flat).sum(0)
    x.add_(m.g(m.norm(kept)), alpha=0.5)
    return F.relu(x, inplace=True) + middle


def state_in_the_branchs_memory(m: Any, x: Tensor) -> Tensor:
    for layer in (m.f, m.g, m.h):
        y = layer(m.norm(x))
        x = y.add_(x)
    return m.norm(x)


def copied_before_a_write(m: Any, x: Tensor) -> Tensor:
    x = m.h(x)
    first = x.clone()
    x.add_(m.f(x))
    second = x.double().clone()
    x.add_(m.g(x))
    return m.f(m.norm(x)) * first * second


# Additions in place whose result is read by a name that is older than they are.


def in_place_statements(m: Any, x: Tensor) -> Tensor:
    for first, second in ((m.f, m.g), (m.g, m.h)):
        x = x + first(m.norm(x))
        x.add_(second(m.norm(x)))
    return x


def kept_name(m: Any, x: Tensor) -> Tensor:
    x = m.h(x)
    for layer in (m.f, m.g):
        h = x + layer(x)
        kept = h
        h.add_(m.h(h))
        x = kept
    return kept


def subtracted_in_place(m: Any, x: Tensor) -> Tensor:
    for layer in (m.f, m.g):
        x = x - layer(x)
        x.sub_(m.h(x), alpha=2)
    return x


def added_through_a_view(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = m.h(x)
    for layer in (m.f, m.g):
        x = x + layer(x)
        x.view(-1, 8).add_(m.h(x).view(-1, 8))
    flat = x.view(-1, 8)
    flat.add_(m.f(flat))
    return x, x[:, 0]


def copies_and_views_of_the_old_name(m: Any, x: Tensor) -> list[Tensor]:
    x = x + m.f(x)
    flat = x.view(-1, 8)
    x.add_(m.g(x))
    scaled = x.clone().mul_(2)
    x.add_(m.h(flat).view(2, 4, 8))
    return [scaled, x.double(), m.f(flat), m.g(x.view(-1, 8))]


def absorbed_in_place(m: Any, x: Tensor) -> Tensor:
    x = x + m.f(x)
    x.add_(m.positions)
    x = x + m.g(x)
    x.add_(m.positions)
    return m.norm(x)


def unread_before_an_old_name(m: Any, x: Tensor) -> Tensor:
    for _ in range(2):
        n = m.norm(x)
        x = x + m.f(n)
        x.add_(m.g(n))
    return x


def nested_on_an_old_name(m: Any, x: Tensor) -> Tensor:
    for _ in range(2):
        x = x + m.f(x)
        x.add_(m.g(x))
        y = x + m.h(x)
        y = y + m.f(y)
        x = x + m.h(y)
    return x


def written_before_it_starts(m: Any, x: Tensor) -> Tensor:
    x = m.h(x)
    x[:, 0].add_(1.0)
    x.mul_(4.0)
    x[:, 2, :4].zero_()
    return pre_norm(m, x)


def pythons_sum(m: Any, x: Tensor) -> Tensor:
    """It starts from the number 0."""
    for first, second in ((m.f, m.g), (m.g, m.h)):
        x = sum([x, first(m.norm(x)), second(m.norm(x))])
    return x * 1.0


def reshaped(m: Any, x: Tensor) -> Tensor:
    """OPT's: the second sublayer works on flattened tokens."""
    for _ in range(2):
        x = x + m.f(m.norm(x))
        x = x.reshape(-1, 8)
        x = (x + m.g(m.norm(x))).view(2, 4, 8)
    return x


def transposed(m: Any, x: Tensor) -> Tensor:
    x = x.transpose(0, 1)
    for layer in (m.f, m.g):
        x = x + layer(m.norm(x))
        x = x.transpose(0, 2).permute(2, 1, 0)
    return x.transpose(0, 1)


def absorbed_broadcast(m: Any, x: Tensor) -> Tensor:
    x = x + m.f(x)
    x = x + m.positions[:1]
    x = m.scale + x
    return x + m.g(x)


def product(m: Any, x: Tensor) -> Tensor:
    x = torch.addcmul(x, m.f(x), m.scale, value=0.5)
    return torch.addcmul(x, m.scale, m.g(x))


def subtracted(m: Any, x: Tensor) -> Tensor:
    x = x - m.f(x)
    return torch.sub(x, m.g(x), alpha=2)


def nested(m: Any, x: Tensor) -> Tensor:
    for _ in range(2):
        y = x
        for layer in (m.f, m.g):
            y = y + layer(m.norm(y))
        x = x + m.h(y)
    return x


def forked(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x + m.f(x)
    a = x + m.g(x)
    a = a + m.h(a)
    b = x + m.h(x)
    b = b + m.f(b)
    return a, b + m.g(b)


def every_state_returned(m: Any, x: Tensor) -> list[Tensor]:
    states = [x]
    for layer in (m.f, m.g, m.h):
        states.append(states[-1] + layer(states[-1]))
    return states


def shared_branch(m: Any, x: Tensor) -> Tensor:
    branch = m.f(x)
    x = x + branch
    x = x + m.g(x) + branch
    return x * branch


def sizes_of_unread_states(m: Any, x: Tensor) -> Tensor:
    n = m.norm(x)
    between = x + m.f(n)
    x = between + m.g(n).view(between.size(0), -1, 8)
    return x + m.h(x).view_as(between)


BODIES: tuple[Body, ...] = (
    pre_norm,
    in_place,
    state_in_the_branchs_memory,
    copied_before_a_write,
    in_place_statements,
    kept_name,
    subtracted_in_place,
    added_through_a_view,
    copies_and_views_of_the_old_name,
    absorbed_in_place,
    unread_before_an_old_name,
    nested_on_an_old_name,
    written_before_it_starts,
    pythons_sum,
    reshaped,
    transposed,
    absorbed_broadcast,
    product,
    subtracted,
    nested,
    forked,
    every_state_returned,
    shared_branch,
    sizes_of_unread_states,
)
