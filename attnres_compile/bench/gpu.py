"""Time of one block's model on a GPU, beside eager PyTorch, Inductor, Liger and fla.

The sublayers do next to nothing, so that what is timed are the mixes, the additions and the norms
around them. Bandwidth is what a block has to move at least (two phases, all fused) over its time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from attnres_compile.bench.machine import machine
from attnres_compile.bench.residual_model import EPS, Mixer, ResidualModel, attnres_mix, stacked_mix
from attnres_compile.errors import InputError


def measure(*, width: int, blocks: int, sublayers: int, tokens: int, runs: int) -> dict[str, Any]:
    """Milliseconds forward and forward plus backward, by form.

    Raises:
        InputError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise InputError(
            "bench gpu needs a GPU that PyTorch can use, and finds none; bench bytes and bench "
            "aot need none."
        )
    if min(width, blocks, sublayers, tokens, runs) < 1:
        raise InputError("width, blocks, sublayers, tokens and runs must be positive.")
    root = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    sizes = [sublayers] * blocks
    row = tokens * width * root.element_size()
    rows = [_least_rows(n, sublayers) for n in range(1, blocks + 1)]
    least = row * sum(forward for forward, _ in rows)
    both = least + row * sum(backward for _, backward in rows)
    found: dict[str, Any] = {}
    for name, (mixer, backend) in forms().items():
        torch.manual_seed(0)
        torch._dynamo.reset()
        model: Any = ResidualModel(sizes, width, mixer).to("cuda", torch.bfloat16)
        if backend is not None:
            model = torch.compile(model, backend=backend)
        forward = _milliseconds(partial(_infer, model, root), runs)
        step = _milliseconds(partial(_train, model, root), runs)
        found[name] = {
            "forward_milliseconds": forward,
            "step_milliseconds": step,
            "forward_gigabytes_per_second": least / forward / 1e6,
            "step_gigabytes_per_second": both / step / 1e6,
        }
    shape = {"width": width, "blocks": blocks, "sublayers": sublayers, "tokens": tokens}
    return {**shape, "forms": found, "machine": machine()}


def forms() -> dict[str, tuple[Mixer, str | None]]:
    """What is compared: who mixes, and who compiles. Of the peers, those that are installed."""
    found: dict[str, tuple[Mixer, str | None]] = {
        "attnres": (attnres_mix, "attnres"),
        "eager operator": (attnres_mix, None),
        "eager naive": (stacked_mix, None),
        "Inductor naive": (stacked_mix, "inductor"),
    }
    peers = {"Liger": _liger(), "fla": _fla()}
    return found | {name: (mixer, None) for name, mixer in peers.items() if mixer is not None}


def _liger() -> Mixer | None:
    try:
        liger: Any = importlib.import_module("liger_kernel.ops.attn_res")
    except ImportError:
        return None

    def mix(sources: Sequence[Tensor], query: Tensor) -> Tensor:
        gain = torch.ones_like(query)
        mixed: Tensor = liger.LigerAttnResFunction.apply(
            torch.stack(tuple(sources)), query, gain, EPS
        )
        return mixed

    return mix


def _fla() -> Mixer | None:
    try:
        fla: Any = importlib.import_module("fla.ops.attnres")
    except ImportError:
        return None

    def mix(sources: Sequence[Tensor], query: Tensor) -> Tensor:
        gain = torch.ones_like(query)
        mixed: Tensor = fla.fused_attnres(query, tuple(sources), gain, rms_eps=EPS)
        return mixed

    return mix


def _least_rows(n: int, s: int) -> tuple[int, int]:
    """Rows of a block that is fused as well as can be: one pass or two, whichever moves less."""
    forward = min(n + 6 * s - 4, s * n + 4 * s - 2)
    return forward, min(3 * n + 7 * s - 6, 3 * n * s + 5 * s - 3)


def _infer(model: Any, root: Tensor) -> None:
    with torch.no_grad():
        model(root)


def _train(model: Any, root: Tensor) -> None:
    model(root).sum().backward()


def _milliseconds(step: Callable[[], Any], runs: int) -> float:
    """The median time of a step on the GPU, after a few to warm up."""
    for _ in range(3):
        step()
    times: list[float] = []
    event: Any = torch.cuda.Event
    for _ in range(runs):
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)
