"""Random residual networks whose streams, sublayers and sites are known beforehand.

`build` makes the network of a recipe and, beside it, the answer that follows from the vocabulary's
definitions alone. Every residual addition is made by a module of its own, so that a found addition
can be told by its module path in any graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from random_recipes import Absorb, Fork, Group, Read, Recipe, Residual, Step, additions_ahead
from random_residual_modules import (
    AbsorbStep,
    ForkStep,
    GroupStep,
    InterruptStep,
    Network,
    ReadStep,
    ResidualStep,
)


@dataclass(frozen=True, order=True)
class Stream:
    """Labels of the residual additions per sublayer, and the depths of the sites."""

    sublayers: tuple[tuple[int, ...], ...]
    sites: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    streams: tuple[Stream, ...]
    refused: frozenset[int]


@dataclass
class _State:
    label: int | None
    is_residual: bool = False
    is_read: bool = False


@dataclass
class _Chain:
    """The states of one stream while it is being built."""

    is_inner: bool = False
    states: list[_State] = field(default_factory=lambda: [_State(None)])

    def read(self) -> None:
        self.states[-1].is_read = True

    def add(self, label: int) -> None:
        self.states.append(_State(label, is_residual=True))

    def absorb(self) -> None:
        if len(self.states) == 1 and not self.is_inner:
            self.states = [_State(None)]  # a part of the root
        else:
            self.states.append(_State(None))

    def stream(self) -> Stream:
        states = list(self.states)
        while len(states) > 1 and not states[-1].is_residual:
            states.pop()  # an absorbed addition after the last residual one reads the stream
            states[-1].is_read = True
        sublayers: list[list[int]] = [[]]
        sites = []
        depth = 0
        for state in states:
            if state.is_residual:
                assert state.label is not None
                depth += 1
                sublayers[-1].append(state.label)
            if state.is_read:
                sites.append(depth)
                sublayers += [[]] if sublayers[-1] else []
        return Stream(tuple(tuple(s) for s in sublayers if s), tuple(sites))


class _Builder:
    """Makes modules of steps, and keeps the books of the chains they make."""

    def __init__(self, recipe: Recipe, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.chains = [_Chain() for _ in recipe.streams]
        self.current = list(self.chains)  # per stream, the chain that it is on
        self.interrupted: set[int] = set()
        self._labels = 0

    def label(self) -> int:
        self._labels += 1
        return self._labels - 1

    def chain(self, *, is_inner: bool = False) -> _Chain:
        self.chains.append(_Chain(is_inner))
        return self.chains[-1]

    def step(self, step: Step, turn: int, chain: _Chain, left: int) -> tuple[nn.Module, _Chain]:
        """A module for a step, and the chain that the stream is on after it.

        `left` is the number of residual additions that the chain will have after this step.
        """
        if isinstance(step, Residual):
            return self.residual(step, turn, chain), chain
        if isinstance(step, Absorb):
            if step.what == "other":
                self.current[turn - 1].read()
            chain.absorb()
            return AbsorbStep(step, self.dtype), chain
        if isinstance(step, Group):
            return self.group(step, turn, chain), chain
        if isinstance(step, Fork):
            return self.fork(step, turn, chain, left), chain
        chain.read()
        if isinstance(step, Read):
            return ReadStep(), chain
        label = self.label()
        if step.how == "scale":
            self.interrupted.add(label)
        return InterruptStep(step.how, label, self.dtype), self.chain()

    def residual(self, step: Residual, turn: int, chain: _Chain) -> nn.Module:
        chain.read()
        if step.crossed:
            self.current[turn - 1].read()
        labels = [self.label() for _ in step.branches]
        for number, label in enumerate(labels):
            if number == 1 and step.read_between:
                chain.read()
            chain.add(label)
        return ResidualStep(step, labels, self.dtype)

    def group(self, step: Group, turn: int, chain: _Chain) -> nn.Module:
        chain.read()
        inner, last = self.steps(step.inner, turn, self.chain(is_inner=True))
        last.read()
        label = self.label()
        chain.add(label)
        return GroupStep(inner, step.bare, label, self.dtype)

    def fork(self, step: Fork, turn: int, chain: _Chain, left: int) -> nn.Module:
        length = min(step.length, left)  # so that the stream itself is the longer arm
        arm = nn.ModuleList()
        if length:
            chain.read()
            arm, last = self.steps(
                [Residual(("linear",))] * length, turn, self.chain(is_inner=True)
            )
            last.read()
        return ForkStep(arm, self.residual(step.onward, turn, chain))

    def steps(
        self, steps: Sequence[Step], turn: int, chain: _Chain
    ) -> tuple[nn.ModuleList, _Chain]:
        modules = nn.ModuleList()
        for number, step in enumerate(steps):
            module, chain = self.step(step, turn, chain, additions_ahead(steps[number + 1 :]))
            modules.append(module)
        return modules, chain


def build(recipe: Recipe, dtype: torch.dtype = torch.float32) -> tuple[Network, Answer]:
    """The network of a recipe, and what there is to be found in it."""
    builder = _Builder(recipe, dtype)
    places = [(turn, n) for turn, steps in enumerate(recipe.streams) for n in range(len(steps))]
    if recipe.interleaved:
        places.sort(key=lambda place: (place[1], place[0]))
    made = []
    for turn, number in places:
        steps = recipe.streams[turn]
        left = additions_ahead(steps[number + 1 :])
        chain = builder.current[turn]
        module, builder.current[turn] = builder.step(steps[number], turn, chain, left)
        made.append((turn, module))
    for chain in builder.current:
        chain.read()
    found = [chain.stream() for chain in builder.chains]
    long = [stream for stream in found if len(stream.sublayers) > 1]
    short = [label for s in found if s not in long for group in s.sublayers for label in group]
    refused = frozenset(short) | builder.interrupted
    return Network(len(recipe.streams), made).to(dtype), Answer(tuple(sorted(long)), refused)
