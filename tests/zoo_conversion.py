"""A case of the zoo, converted, and what has to hold of it: comparisons that are able to fail."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

import attnres_compile
from attnres_compile.plans import ConversionPlan
from tolerances import relative_error
from zoo_case import Case, Inputs, float_outputs, to_float64

FLOAT32_TOLERANCE = 1e-5
# A gradient that is zero in exact arithmetic (the key bias of a softmax attention) is compared
# with this fraction of the model's largest.
SMALLEST_GRADIENT = 1e-3
VISIBLE = 1e-3


@dataclasses.dataclass(frozen=True)
class Run:
    """One forward and backward pass."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A case's model, an independent copy of it, and the model converted."""

    model: nn.Module
    copied: nn.Module
    converted: Any
    inputs: Inputs
    tolerance: float

    @property
    def plan(self) -> ConversionPlan:
        plan: ConversionPlan = self.converted.plan
        return plan


def convert_case(case: Case, dtype: torch.dtype = torch.float32) -> Conversion:
    """Converts a case's model with the default options: ``aggregate="sum"``, zero queries."""
    model, inputs = case.build(), case.inputs()
    if dtype == torch.float64:
        model, inputs = to_float64(model), to_float64(inputs)
    copied = copy.deepcopy(model)
    args, kwargs = inputs
    converted = attnres_compile.convert(model, args, kwargs)
    tolerance = case.float64_tolerance if dtype == torch.float64 else FLOAT32_TOLERANCE
    return Conversion(model, copied, converted, inputs, tolerance)


def run(model: nn.Module, inputs: Inputs) -> Run:
    """A pass with a fixed loss, and fixed dropout where the model has any."""
    model.zero_grad(set_to_none=True)
    args, kwargs = copy.deepcopy(inputs)
    generator = torch.Generator().manual_seed(7)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        outputs = float_outputs(model(*args, **kwargs))
    losses = [
        (output * torch.randn(output.shape, generator=generator, dtype=output.dtype)).sum()
        for output in outputs
        if output.requires_grad
    ]
    torch.stack([loss.double() for loss in losses]).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return Run([output.detach() for output in outputs], gradients)


def assert_lossless(actual: Run, expected: Run, tolerance: float) -> None:
    """Outputs and gradients of the base weights are equal but for rounding."""
    assert len(actual.outputs) == len(expected.outputs)
    for index, (left, right) in enumerate(zip(actual.outputs, expected.outputs, strict=True)):
        assert left.dtype == right.dtype
        error = relative_error(left, right)
        assert error <= tolerance, f"output {index}: {error:.1e}"
    largest = max(gradient.abs().max().item() for gradient in expected.gradients.values())
    assert set(expected.gradients) == {n for n in actual.gradients if not is_new(n)}
    for name, right in expected.gradients.items():
        scale = max(right.abs().max().item(), SMALLEST_GRADIENT * largest)
        error = (actual.gradients[name] - right).abs().max().item() / scale
        assert error <= tolerance, f"gradient of {name}: {error:.1e}"


def assert_everything_learns(actual: Run, expected: Run, names: set[str]) -> None:
    """With queries that are not zero the output differs, and every new parameter has a gradient."""
    pairs = zip(actual.outputs, expected.outputs, strict=True)
    assert max(relative_error(left, right) for left, right in pairs) > VISIBLE
    assert {name for name in actual.gradients if is_new(name)} == names
    dead = [n for n in sorted(names) if not actual.gradients[n].abs().max().isfinite()]
    dead += [n for n in sorted(names) if not actual.gradients[n].any()]
    assert not dead


def assert_same_state(actual: nn.Module, expected: nn.Module) -> None:
    """The same class and the same state dict: names in order, bits, and which tensors are one."""
    assert type(actual) is type(expected)
    state, expected_state = actual.state_dict(), expected.state_dict()
    assert list(state) == list(expected_state)
    for name, tensor in expected_state.items():
        if isinstance(tensor, Tensor):  # a module's extra state need not be one
            assert torch.equal(state[name], tensor), name
    assert shared_tensors(actual) == shared_tensors(expected)
    modules, expected_modules = dict(actual.named_modules()), dict(expected.named_modules())
    assert {n: type(m) for n, m in modules.items()} == {
        n: type(m) for n, m in expected_modules.items()
    }


def shared_tensors(model: nn.Module) -> dict[str, str]:
    """Under which name each parameter and buffer was met first."""
    first: dict[int, str] = {}
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def randomize(converted: nn.Module) -> None:
    """Queries with scores of order one, and gains around one."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in converted.named_parameters():
            if not is_new(name):
                continue
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if name.endswith(".query"):
                parameter.copy_(noise * parameter.numel() ** -0.5)
            else:
                parameter.copy_(1 + 0.3 * noise)


def is_new(name: str) -> bool:
    return "attnres" in name.split(".")


def new_names(plan: ConversionPlan) -> set[str]:
    """The parameters that a plan says a converted model has beside its own."""
    names = {n for s in plan.streams for site in s.sites for n in (site.query_name, site.gain_name)}
    return {name for name in names if name is not None}


def sites_of(plan: ConversionPlan) -> list[Any]:
    """What has to be the same of two plans of one model, however it was captured."""
    return [
        (
            stream.name,
            stream.owner,
            stream.root,
            stream.width,
            [[[(a.module_path, a.ordinal) for a in s.additions] for s in b] for b in stream.blocks],
            [(site.name, site.depth, site.state, site.num_sources) for site in stream.sites],
            [[(r.module_path, r.scale_invariant) for r in site.readers] for site in stream.sites],
        )
        for stream in plan.streams
    ]
