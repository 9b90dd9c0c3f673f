"""What has to hold of a converted model under the ``attnres`` backend, whatever its kernels.

A script as well: Triton reads TRITON_INTERPRET when it is imported, so test_backend.py runs the
checks with interpreted kernels in processes of their own: ``backend_checks.py CHECK ...``.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import attnres_compile
from attnres_compile import AttnResConfig
from backend_cases import CASES
from zoo import by_name
from zoo_conversion import FLOAT32_TOLERANCE, assert_lossless, is_new, randomize, run

STEPS = 20


def converted_model(name: str, num_blocks: int = 4) -> tuple[Any, Any]:
    """A model of the zoo or of ``backend_cases.py`` with random queries, and its inputs."""
    case = CASES[name] if name in CASES else by_name(name)
    args, kwargs = case.inputs()
    model = case.build()
    deepest = attnres_compile.plan(model, args, kwargs).streams
    blocks = min(num_blocks, max(len(stream.sublayers) for stream in deepest))
    config = AttnResConfig(num_blocks=blocks)
    converted = attnres_compile.convert(model, args, kwargs, config=config)
    randomize(converted)
    return converted, (args, kwargs)


def compile_with(model: Callable[..., Any], kernels: str, **options: Any) -> Any:
    options = {"kernels": kernels, **options}
    return torch.compile(model, backend="attnres", fullgraph=True, options=options)


def check_as_eager(name: str, kernels: str) -> None:
    """Outputs and every gradient are those of the eager converted model."""
    converted, inputs = converted_model(name)
    expected = run(converted, inputs)
    expected.gradients.update({n: g.clone() for n, g in expected.gradients.items()})
    found = run(_Named(compile_with(converted, kernels), converted), inputs)
    # The compiled backward pass has zeros where the eager one has nothing.
    for extra in found.gradients.keys() - expected.gradients.keys():
        assert not found.gradients.pop(extra).any(), extra
    base = {n: g for n, g in expected.gradients.items() if not is_new(n)}
    assert_lossless(found, type(expected)(expected.outputs, base), 10 * FLOAT32_TOLERANCE)
    for parameter, gradient in expected.gradients.items():
        error = (found.gradients[parameter] - gradient).abs().max() / gradient.abs().max()
        assert not is_new(parameter) or error < 1e-4, (parameter, error)


class _Named(nn.Module):
    """A compiled model under the parameter names of the original."""

    def __init__(self, compiled: Any, converted: Any) -> None:
        super().__init__()
        self.__dict__.update(compiled=compiled, converted=converted)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.compiled(*args, **kwargs)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.converted.zero_grad(set_to_none=set_to_none)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.converted.named_parameters(*args, **kwargs)


def check_training(name: str, kernels: str, steps: int = STEPS) -> None:
    """The losses of some steps of training are those of the eager converted model."""
    converted, inputs = converted_model(name)
    expected = losses(copy.deepcopy(converted), None, inputs, steps)
    found = losses(converted, compile_with(converted, kernels), inputs, steps)
    assert expected[-1] < 0.9 * expected[0]
    for one, other in zip(found, expected, strict=True):
        assert abs(one - other) <= 1e-4 * abs(other), (found, expected)


def losses(model: Any, compiled: Any, inputs: Any, steps: int) -> list[float]:
    args, kwargs = inputs
    # Not eps=1e-8: it turns the rounding errors of gradients near zero into steps of their own.
    optimizer = torch.optim.AdamW(
        attnres_compile.param_groups(model, lr=1e-2, query_lr=1e-2, weight_decay=0.0), eps=1e-5
    )
    found = []
    for _ in range(steps):
        output = (model if compiled is None else compiled)(*args, **kwargs)
        logits = getattr(output, "logits", getattr(output, "last_hidden_state", output))
        loss = (logits - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def check_launches(name: str) -> None:
    """The generated kernels of every phase, forward and backward, are launched."""
    from attnres_compile.kernels import launch

    launched: set[str] = set()
    launch.observers.append(lambda specialisation, _: launched.add(specialisation.template))
    check_as_eager(name, "triton")
    for operator in ("complete", "phase1", "phase2"):
        assert {f"{operator}_forward", f"{operator}_backward"} <= launched, launched


CHECKS = {
    "small_gpt": lambda: check_launches("small_gpt"),
    "llama": lambda: check_launches("llama"),
    "transposed_tokens": lambda: check_launches("transposed_tokens"),
    "gpt2": lambda: check_as_eager("gpt2", "triton"),
    "vit": lambda: check_as_eager("vit", "triton"),
    "t5": lambda: check_as_eager("t5", "triton"),
    "preact_resnet": lambda: check_as_eager("preact_resnet", "triton"),
    "train-llama": lambda: check_training("llama", "triton"),
    "train-vit": lambda: check_training("vit", "triton"),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for check in sys.argv[1:]:
        torch.manual_seed(0)
        torch._dynamo.reset()
        CHECKS[check]()
        print("passed", check, flush=True)
