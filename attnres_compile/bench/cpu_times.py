"""Times of steps and first calls on a CPU, of all forms of a network in one process.

``python -m attnres_compile.bench.cpu_times`` with shapes, modes and the number of rounds as JSON
says the `Times` of each shape and mode. All forms run in turns, in an order that is reversed from
one round to the next, so that what else the machine does falls on all alike. The naive form (stack
the sources, norm them, sum) stands beside the eager operator, whose overhead it is to judge.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnres_compile.bench.child import say_found, say_step
from attnres_compile.bench.decoder import SHAPES, models

COMPILED = ("plain", "converted")
EAGER = ("eager_plain", "eager_converted", "eager_naive")


@dataclass(frozen=True)
class Times:
    """Of one shape and mode, in seconds.

    Attributes:
        first_calls: of each compiled form, with its compilation.
        steps: of each form, one for each round.
    """

    first_calls: dict[str, float]
    steps: dict[str, list[float]]


def time_all(
    shapes: Sequence[str], modes: Sequence[str], rounds: int, plain_first: bool
) -> list[Times]:
    """The times of every mode of every shape, in that order; says so after each step.

    The form that is compiled second finds some of what the first one has imported and kept, so
    processes take turns in ``plain_first``.
    """
    import torch._inductor.config

    # A first call is to compile, not to find what an earlier process has compiled.
    with torch._inductor.config.patch(force_disable_caches=True):
        for mode in modes if set(shapes) != {"tiny"} else ():
            # imports, and libraries that are built once and kept
            _first_calls("tiny", mode, plain_first)
        return [_time(name, mode, rounds, plain_first) for name in shapes for mode in modes]


def steps_of(shapes: Sequence[str], modes: Sequence[str], rounds: int) -> int:
    """How many steps `time_all` has, for a progress bar."""
    return len(shapes) * len(modes) * 2 * (1 + rounds)


def _time(name: str, mode: str, rounds: int, plain_first: bool) -> Times:
    steps, first_calls = _first_calls(name, mode, plain_first, say_step)
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {form: [] for form in steps}
    # Compiled and eager forms apart, and in the other order each time: a form comes as often after
    # itself as after the other, and not after one that leaves caches and pages in another state.
    for group in (COMPILED, EAGER):
        for i in range(rounds):
            for form in reversed(group) if i % 2 else group:
                times[form].append(_timed(steps[form]))
            say_step()
    return Times(first_calls, times)


def _first_calls(
    name: str, mode: str, plain_first: bool, tick: Callable[[], None] = lambda: None
) -> tuple[dict[str, Callable[[], None]], dict[str, float]]:
    """What a step of each form is, and how long the first one of the compiled forms took."""
    made, ids = models(SHAPES[name])
    torch._dynamo.reset()
    forms = {
        "plain": torch.compile(made["plain"], backend="inductor", fullgraph=True),
        "converted": torch.compile(made["converted"], backend="attnres", fullgraph=True),
    }
    steps = {form: _step(compiled, made[form], ids, mode) for form, compiled in forms.items()}
    seconds = {}
    for form in COMPILED if plain_first else reversed(COMPILED):
        seconds[form] = _timed(steps[form])
        tick()
    eager = {f"eager_{key}": _step(model, model, ids, mode) for key, model in made.items()}
    return {**steps, **eager}, seconds


def _step(form: Callable[..., Tensor], model: nn.Module, ids: Tensor, mode: str) -> Any:
    """One step: a forward pass, in training with a loss and a backward pass."""

    def infer() -> None:
        with torch.no_grad():
            form(ids)

    def train() -> None:
        model.zero_grad()
        loss: Any = F.cross_entropy(form(ids).flatten(0, 1), ids.flatten())
        loss.backward()

    return infer if mode == "inference" else train


def _timed(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main(what: str) -> None:
    """Says what `time_all` finds for its arguments in JSON."""
    say_found([asdict(times) for times in time_all(**json.loads(what))])


if __name__ == "__main__":
    main(sys.argv[1])
