"""Step time and first-call compile time of a converted model over the unconverted one, on a CPU.

Everything that is compared runs in one process and in turns, in an order that is reversed from one
round to the next, so that what else the machine does falls on all alike. A ratio is the median of
the ratios of all rounds. The naive form (stack the sources, norm them, sum) stands beside the eager
operator, whose overhead it is to judge.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnres_compile.bench.machine import machine
from attnres_compile.bench.residual_model import stacked_mix
from attnres_compile.config import AttnResConfig
from attnres_compile.conversion import convert

MODES = ("inference", "training")
VOCABULARY = 512
Progress = Callable[[], None]


@dataclass(frozen=True)
class Shape:
    layers: int
    width: int
    heads: int
    batch: int
    tokens: int
    blocks: int


SHAPES = {
    "a": Shape(layers=12, width=512, heads=8, batch=4, tokens=256, blocks=4),
    "b": Shape(layers=24, width=128, heads=4, batch=8, tokens=256, blocks=8),
    "tiny": Shape(layers=2, width=32, heads=2, batch=2, tokens=16, blocks=2),
}


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return result


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(shape)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class Decoder(nn.Module):
    """A plain pre-norm transformer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class NaiveDecoder(nn.Module):
    """The same network with the same sites as its conversion, each a stack of all its sources."""

    def __init__(self, plain: Decoder, blocks: int) -> None:
        super().__init__()
        self.plain = plain
        self.sublayers = 2 * len(plain.layers)
        self.size = self.sublayers // blocks
        width = plain.norm.weight.numel()
        self.queries = nn.ParameterList(
            nn.Parameter(torch.zeros(width)) for _ in range(self.sublayers)
        )

    def forward(self, ids: Tensor) -> Tensor:
        completed = [self.plain.embedding(ids)]
        partial: list[Tensor] = []
        for number in range(self.sublayers):
            layer: Any = self.plain.layers[number // 2]
            norm, body = (layer.norm2, layer.mlp) if number % 2 else (layer.norm1, layer.attention)
            branch = body(norm(self._read([*completed, *partial], number)))
            partial = [partial[0] + branch] if partial else [branch]
            if (number + 1) % self.size == 0:
                completed, partial = [*completed, *partial], []
        last = self._read([*completed, *partial], self.sublayers)
        logits: Tensor = self.plain.head(self.plain.norm(last))
        return logits

    def _read(self, sources: Sequence[Tensor], number: int) -> Tensor:
        if len(sources) == 1:
            return sources[0]
        return len(sources) * stacked_mix(sources, self.queries[number - 1])


def models(shape: Shape) -> tuple[dict[str, Any], Tensor]:
    """The plain, the converted and the naive network, which all compute the same, and an input."""
    torch.manual_seed(0)
    plain = Decoder(shape)
    ids = torch.randint(0, VOCABULARY, (shape.batch, shape.tokens))
    converted = convert(plain, (ids,), config=AttnResConfig(num_blocks=shape.blocks))
    naive = NaiveDecoder(copy.deepcopy(plain), shape.blocks)
    return {"plain": plain, "converted": converted, "naive": naive}, ids


def measure(
    names: Sequence[str], modes: Sequence[str], pairs: int, tick: Progress = lambda: None
) -> dict[str, Any]:
    """All shapes and modes; `tick` is called `steps_of(...)` times.

    The keys inference_ratio, training_ratio and compile_ratio are of the worst shape; those of
    each stand in "shapes".
    """
    import torch._inductor.config

    shapes: dict[str, dict[str, Any]] = {}
    # A first call is to compile, not to find what an earlier process has compiled.
    with torch._inductor.config.patch(force_disable_caches=True):
        for mode in modes if set(names) != {"tiny"} else ():
            _first_calls("tiny", mode)  # imports, and libraries that are built once and kept
        for name in names:
            shapes[name] = asdict(SHAPES[name])
            for mode in modes:
                shapes[name] |= _measure(name, mode, pairs, tick)
            compiles = [shapes[name][f"{mode}_compile_ratio"] for mode in modes]
            shapes[name]["compile_ratio"] = max(compiles)
    ratios = [key for key in next(iter(shapes.values())) if key.endswith("_ratio")]
    worst = {key: max(shape[key] for shape in shapes.values()) for key in ratios}
    return {**worst, "shapes": shapes, "pairs": pairs, "machine": machine()}


def steps_of(names: Sequence[str], modes: Sequence[str], pairs: int) -> int:
    """How much there is to do, for a progress bar."""
    return len(names) * len(modes) * 2 * (pairs + 1)


def _first_calls(
    name: str, mode: str, tick: Progress = lambda: None
) -> tuple[dict[str, Callable[[], None]], dict[str, float]]:
    """What a step of each form is, and how long the first one of the compiled forms took."""
    made, ids = models(SHAPES[name])
    torch._dynamo.reset()
    forms = {
        "plain": torch.compile(made["plain"], backend="inductor", fullgraph=True),
        "converted": torch.compile(made["converted"], backend="attnres", fullgraph=True),
    }
    steps = {key: _step(form, made[key], ids, mode) for key, form in forms.items()}
    seconds = {}
    for key, step in steps.items():
        seconds[key] = _timed(step)
        tick()
    eager = {f"eager_{key}": _step(model, model, ids, mode) for key, model in made.items()}
    return {**steps, **eager}, seconds


def _measure(name: str, mode: str, pairs: int, tick: Progress) -> dict[str, Any]:
    steps, compiling = _first_calls(name, mode, tick)
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {key: [] for key in steps}
    compiled = ["plain", "converted"]
    # Compiled and eager forms apart, and in the other order each time: a form comes as often after
    # itself as after the other, and not after one that leaves caches and pages in another state.
    for group in (compiled, [key for key in steps if key not in compiled]):
        for i in range(pairs):
            for key in reversed(group) if i % 2 else group:
                times[key].append(_timed(steps[key]))
            tick()

    def ratio(key: str, base: str) -> list[float]:
        return [one / other for one, other in zip(times[key], times[base], strict=True)]

    pairwise = ratio("converted", "plain")
    return {
        f"{mode}_ratio": median(pairwise),
        f"{mode}_quartiles": quantiles(pairwise, n=4) if pairs > 1 else pairwise,
        f"{mode}_compile_ratio": compiling["converted"] / compiling["plain"],
        f"{mode}_compile_seconds": compiling,
        f"eager_{mode}_ratio": median(ratio("eager_converted", "eager_plain")),
        f"naive_{mode}_ratio": median(ratio("eager_naive", "eager_plain")),
        f"{mode}_milliseconds": {key: 1000 * median(each) for key, each in times.items()},
    }


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
