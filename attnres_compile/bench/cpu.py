"""Step time and first-call compile time of a converted model over the unconverted one, on a CPU.

A ratio of steps is the median of the ratios of all rounds, in which the forms ran one after the
other. The rounds are taken in several processes, since the medians of single ones lie hundredths
apart, up to 0.06 ("by_process" in the results), which no number of rounds in one process shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import median, quantiles
from typing import Any

from attnres_compile.bench import child, cpu_times
from attnres_compile.bench.cpu_times import Times
from attnres_compile.bench.decoder import SHAPES
from attnres_compile.bench.machine import machine
from attnres_compile.errors import InputError


def measure(
    shapes: Sequence[str],
    modes: Sequence[str],
    pairs: int,
    processes: int,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """All shapes and modes, in `pairs` rounds; `tick` is called `steps_of(...)` times.

    The keys inference_ratio, training_ratio and compile_ratio are of the worst shape; those of
    each stand in "shapes".

    Raises:
        InputError: pairs or processes are not positive.
        BackendError: a process that measured failed.
    """
    if pairs < 1 or processes < 1:
        raise InputError("pairs and processes must be positive.")
    shapes, modes = list(dict.fromkeys(shapes)), list(dict.fromkeys(modes))
    taken: list[list[Times]] = []
    for number, rounds in enumerate(_shares(pairs, processes)):
        case = {"shapes": shapes, "modes": modes, "rounds": rounds, "plain_first": number % 2 == 0}
        module = ("-m", cpu_times.__name__, json.dumps(case))
        found = child.found_by(*module, environment={}, tick=tick)
        taken.append([Times(**times) for times in found])
    ratios: dict[str, dict[str, Any]] = {name: asdict(SHAPES[name]) for name in shapes}
    cases = [(name, mode) for name in shapes for mode in modes]
    for (name, mode), times in zip(cases, zip(*taken, strict=True), strict=True):
        ratios[name] |= _ratios(mode, times)
    for shape in ratios.values():
        shape["compile_ratio"] = max(shape[f"{mode}_compile_ratio"] for mode in modes)
    keys = [key for key in next(iter(ratios.values())) if key.endswith("_ratio")]
    worst = {key: max(shape[key] for shape in ratios.values()) for key in keys}
    counts = {"pairs": pairs, "processes": len(taken)}
    return {**worst, "shapes": ratios, **counts, "machine": machine()}


def steps_of(shapes: Sequence[str], modes: Sequence[str], pairs: int, processes: int) -> int:
    """How much there is to do, for a progress bar."""
    return sum(cpu_times.steps_of(shapes, modes, each) for each in _shares(pairs, processes))


def _shares(pairs: int, processes: int) -> list[int]:
    """How many rounds each process takes: none takes none, and none two more than another."""
    shares = (len(range(number, pairs, processes)) for number in range(processes))
    return [share for share in shares if share]


def _ratios(mode: str, processes: Sequence[Times]) -> dict[str, Any]:
    """Of one shape and mode, from its times in all processes."""
    forms = processes[0].steps
    steps = {form: [t for times in processes for t in times.steps[form]] for form in forms}

    def ratio(form: str, base: str) -> float:
        return median(_pairwise(steps, form, base))

    pairwise = _pairwise(steps, "converted", "plain")
    first_calls = [times.first_calls for times in processes]
    return {
        f"{mode}_ratio": median(pairwise),
        f"{mode}_quartiles": quantiles(pairwise, n=4) if len(pairwise) > 1 else pairwise,
        f"{mode}_by_process": [
            median(_pairwise(times.steps, "converted", "plain")) for times in processes
        ],
        f"{mode}_compile_ratio": median(each["converted"] / each["plain"] for each in first_calls),
        f"{mode}_compile_seconds": {
            form: median(each[form] for each in first_calls) for form in first_calls[0]
        },
        f"eager_{mode}_ratio": ratio("eager_converted", "eager_plain"),
        f"naive_{mode}_ratio": ratio("eager_naive", "eager_plain"),
        f"{mode}_milliseconds": {form: 1000 * median(each) for form, each in steps.items()},
    }


def _pairwise(steps: Mapping[str, Sequence[float]], form: str, base: str) -> list[float]:
    return [one / other for one, other in zip(steps[form], steps[base], strict=True)]
