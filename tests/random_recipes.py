"""Recipes of random residual networks, and hypothesis strategies that draw them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hypothesis import strategies as st

BRANCHES = tuple("linear polynomial attention low_rank experts pooling scaled scan".split())
SPELLINGS = tuple("left right function method alpha subtracted product flattened".split())
CARRIERS = tuple("plain copied contiguous cast widened viewed turned unsqueezed".split())
IN_PLACE = ("in place", "statement", "statement on a view", "subtracted statement")
"""In place; as statements, after which the state is read by the name of the one before."""


@dataclass(frozen=True)
class Residual:
    """``x = x + branch(x)``; with several branches, all of them read the same x.

    Attributes:
        branches: kinds of the branches, one addition each.
        spelling: how the additions are written.
        carrier: through what the skip goes to the first addition.
        normed: whether the branches read a norm of x.
        crossed: whether they also read the stream before this one.
        read_between: whether the state after the first addition is read.
    """

    branches: tuple[str, ...]
    spelling: str = "left"
    carrier: str = "plain"
    normed: bool = True
    crossed: bool = False
    read_between: bool = False


@dataclass(frozen=True)
class Absorb:
    """``x = x + something`` that does not depend on the stream."""

    what: str
    right: bool = False


@dataclass(frozen=True)
class Read:
    """An output of the network is computed from x."""


@dataclass(frozen=True)
class Interrupt:
    """The carrier is normed, activated or scaled: another stream begins."""

    how: str


@dataclass(frozen=True)
class Group:
    """``x = x + f(inner(x))``, an outer skip over a stream of its own."""

    inner: tuple[Step, ...]
    bare: bool = False


@dataclass(frozen=True)
class Fork:
    """A second arm of `length` residual additions leaves x; then the stream goes on."""

    length: int
    onward: Residual


Step = Residual | Absorb | Read | Interrupt | Group | Fork


@dataclass(frozen=True)
class Recipe:
    """The steps of each stream; `interleaved` streams take turns."""

    streams: tuple[tuple[Step, ...], ...]
    interleaved: bool = False


def additions_ahead(steps: Sequence[Step]) -> int:
    """Residual additions to come before the stream is interrupted."""
    count = 0
    for step in steps:
        if isinstance(step, Interrupt):
            break
        residual = step.onward if isinstance(step, Fork) else step
        count += len(residual.branches) if isinstance(residual, Residual) else 0
        count += isinstance(step, Group)
    return count


def _branches(at_most: int = 3) -> st.SearchStrategy[tuple[str, ...]]:
    drawn = st.lists(st.sampled_from(BRANCHES), min_size=1, max_size=at_most)
    return drawn.map(tuple)


def _residuals(*, first: bool) -> st.SearchStrategy[Residual]:
    """Residual steps; only in place on a state that nothing else needs, hence `first`."""
    return st.builds(
        Residual,
        branches=_branches(),
        spelling=st.sampled_from(SPELLINGS if first else (*SPELLINGS, *IN_PLACE)),
        carrier=st.sampled_from(CARRIERS),
        normed=st.booleans(),
        crossed=st.booleans() if not first else st.just(False),
        read_between=st.booleans(),
    ).map(lambda r: replace(r, carrier="plain") if r.spelling in IN_PLACE else r)


def _steps(depth: int) -> st.SearchStrategy[Step]:
    """Any step; groups are nested `depth` deep."""
    kinds: list[st.SearchStrategy[Step]] = [
        _residuals(first=False),
        _residuals(first=False),
        st.builds(
            Absorb,
            what=st.sampled_from(("positions", "bias", "other")),
            right=st.booleans(),
        ),
        st.just(Read()),
        st.builds(Interrupt, how=st.sampled_from(("norm", "activation", "scale"))),
        st.builds(Fork, length=st.integers(1, 3), onward=_residuals(first=True)),
    ]
    if depth:
        inner = st.tuples(_residuals(first=True), st.lists(_steps(depth - 1), max_size=4))
        kinds.append(
            st.builds(Group, inner.map(lambda steps: (steps[0], *steps[1])), st.booleans())
        )
    return st.one_of(kinds)


def _alone(step: Step) -> Step:
    """The step without what it takes from another stream."""
    if isinstance(step, Residual):
        return replace(step, crossed=False)
    if isinstance(step, Absorb) and step.what == "other":
        return replace(step, what="positions")
    if isinstance(step, Group):
        return replace(step, inner=tuple(map(_alone, step.inner)))
    return step


def recipes(largest: int = 6) -> st.SearchStrategy[Recipe]:
    """Recipes of one to three streams of up to `largest` steps each."""
    stream = st.lists(_steps(depth=2), min_size=1, max_size=largest).map(tuple)
    streams = st.lists(stream, min_size=1, max_size=3)
    # The first stream has no stream before it.
    whole = streams.map(lambda drawn: (tuple(map(_alone, drawn[0])), *drawn[1:]))
    return st.builds(Recipe, whole, st.booleans())
