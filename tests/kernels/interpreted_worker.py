"""Compares the Triton kernels, interpreted, with the specification; prints errors as JSON lines.

Triton reads TRITON_INTERPRET when it is imported, so test_triton_phases.py runs this in processes
of its own, with the names of checks as arguments.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import test_phases
import torch
import triton.language as tl
from liger_kernel.ops.attn_res import LigerAttnResFunction
from torch import Tensor
from triton.runtime import interpreter

from attnres_compile.kernels import launch, phases
from mix_cases import make_case
from phase_cases import SHARP, PhaseCase, by_phases, by_specification
from tolerances import relative_error

TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 2e-6,
    torch.float16: 2e-3,
    # Rounded between the sites of a block, as gradients are: some neighbouring numbers, 8e-3 each.
    torch.bfloat16: 2e-2,
}

# A sample that runs in CI: numbers of sources and of sites around the limits, all widths and
# tokens, and what else a case can have. Not every pair of sizes: test_pairwise_sizes.py has those.
# Few tokens or few sites where the other is large, since the interpreter is slow.
SIZES = {
    "one-source": PhaseCase(1, (3,), (5, 96)),
    "two-sources": PhaseCase(2, (2, 3), (257, 48), norm="layer"),
    "two-phase": PhaseCase(3, (4, 2), (5, 1000), wants_mix=True),
    "wide": PhaseCase(4, (2, 1), (5, 4096)),
    "wide-one-token": PhaseCase(5, (1, 1), (1, 4096), norm="layer"),
    "many-tokens": PhaseCase(3, (2, 2), (257, 1000)),
    "eight-sources": PhaseCase(8, (6, 1), (2, 3, 64)),
    "twelve-sites": PhaseCase(8, (12,), (5, 64)),
    "thirteen-sites": PhaseCase(3, (13,), (5, 48)),
    "seventeen-sites": PhaseCase(4, (17,), (1, 96)),
    "twenty-four-sites": PhaseCase(3, (24, 1), (5, 64), norm="none"),
    "thirty-three-sources": PhaseCase(33, (2,), (5, 64), norm="none"),
    "sixty-five-sites": PhaseCase(3, (1, 8, 57), (3, 48)),
    "images": PhaseCase(4, (3, 2), (2, 96, 3, 5), dim=1, norm="layer", wants_mix=True),
    "no-weights": PhaseCase(3, (2, 2), (2, 48, 3), dim=-2, affine=False, count=False),
    "no-tokens": PhaseCase(3, (2, 2), (0, 48)),
}


def poison(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """``launch.allocate``, filled with what may not be left in any result."""
    result = torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
    return result.fill_(float("nan"))


@dataclass
class Errors:
    """Relative errors of a case's outputs and gradients."""

    worst: float = 0.0
    excused: dict[str, float] = field(default_factory=dict)  # at most twice the specification's
    too_large: dict[str, float] = field(default_factory=dict)


def compare(case: PhaseCase, dtype: torch.dtype) -> Errors:
    """All outputs and gradients against the specification in float64.

    Too large is what is above the tolerance of ``dtype`` and above twice what the specification
    loses in that dtype: of a few tokens, the terms of a query's gradient can cancel to a hundredth
    of their size.
    """
    expected = case.expected(dtype)
    found = case.run(by_phases("triton"), dtype)
    assert found.keys() == expected.keys()
    own = case.run(by_specification, dtype)
    errors = Errors()
    for key, value in expected.items():
        error = relative_error(found[key], value)
        errors.worst = max(errors.worst, error)
        if not error <= TOLERANCE[dtype]:
            excused = error <= 2 * relative_error(own[key], value)
            (errors.excused if excused else errors.too_large)[key] = error
    return errors


def check_sizes(name: str, dtype: torch.dtype) -> dict[str, float]:
    return compare(SIZES[name], dtype).too_large


def check_repeated() -> dict[str, float]:
    """Two runs agree bit for bit; a second program takes part from 512 tokens on."""
    case = PhaseCase(3, (2, 1), (600, 64), norm="layer")
    one, other = (case.run(by_phases("triton"), torch.float32) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    expected = case.expected(torch.float32)
    errors = {name: relative_error(one[name], expected[name]) for name in expected}
    return {name: error for name, error in errors.items() if not error <= 2e-6}


def check_sharp() -> dict[str, float]:
    """Where one source has nearly all the weight; the specification itself loses digits there."""
    errors = {}
    for number, case in enumerate(SHARP):
        expected = case.expected(torch.float32)
        for name, result in case.run(by_phases("triton"), torch.float32).items():
            errors[f"{number} {name}"] = relative_error(result, expected[name])
    return {name: error for name, error in errors.items() if not error <= 2e-6}


def check_many_direct_sources() -> dict[str, float]:
    """The one-pass form over more sources than stay in registers, against the specification.

    Logits are of order one, and then so large that one source has nearly all the weight.
    """
    errors = {}
    for count, tokens, sharpness in [(9, 3, 1), (33, 3, 1), (14, 1, 4)]:
        case = make_case(count, (tokens, 1000))
        case = replace(case, query=(sharpness * case.query).detach().requires_grad_())

        def mix(sources: list[Tensor], query: Tensor, gain: Tensor, **_: object) -> Tensor:
            rest = (1e-6, float(len(sources)), "none", None, None, 0.0, None, True, -1, "triton")
            return phases.phase2(None, None, sources, [], query * gain, *rest)[1]

        expected = case.expected()
        for name, result in case.run(mix).items():
            errors[f"{count} {sharpness} {name}"] = relative_error(result, expected[name])
    return {name: error for name, error in errors.items() if not error <= 2e-6}


def check_liger() -> dict[str, float]:
    """The one-pass form against Liger's kernel, on the result and every gradient."""
    errors = {}
    for count, width in [(1, 64), (3, 96), (9, 64)]:
        case = make_case(count, (2, 2, width), aggregate="mean")

        def liger(sources: list[Tensor], query: Tensor, gain: Tensor, **_: object) -> Tensor:
            return LigerAttnResFunction.apply(torch.stack(sources), query, gain, 1e-6)

        def ours(sources: list[Tensor], query: Tensor, gain: Tensor, **_: object) -> Tensor:
            rest = (1e-6, 1.0, "none", None, None, 0.0, None, True, -1, "triton")
            return phases.phase2(None, None, sources, [], query * gain, *rest)[1]

        expected = case.run(liger)
        for name, result in case.run(ours).items():
            errors[f"{count} {name}"] = relative_error(result, expected[name])
    return {name: error for name, error in errors.items() if not error <= 2e-6}


def check_frozen() -> dict[str, float]:
    """Only what needs a gradient gets one, and it is right."""
    case = PhaseCase(4, (3, 2), (5, 48), norm="layer")
    frozen = {"root", "first1", "query0.1", "weight0.0", "bias0.1", "branch0.0", "second2"}
    tensors = case.tensors(torch.float32)
    for name in frozen:
        tensors[name].requires_grad_(False)
    found = case.run_on(by_phases("triton"), tensors)
    expected = case.expected(torch.float32)
    assert found.keys() == {name for name in expected if name.removeprefix("d") not in frozen}
    errors = {name: relative_error(found[name], expected[name]) for name in found}
    return {name: error for name, error in errors.items() if not error <= 2e-6}


def check_newest() -> dict[str, float]:
    """In float16 the newest of many sources is read; derived, its gradients are off by 1e-2."""
    return compare(PhaseCase(24, (4, 4, 4, 4), (1, 64)), torch.float16).too_large


def check_missing() -> dict[str, float]:
    """Sites, sources and partial sums that no gradient arrives at."""
    case = PhaseCase(4, (4, 2), (5, 48))
    results = {}
    for kernels in ("reference", "triton"):
        tensors = case.tensors(torch.float32)
        outputs = by_phases(kernels)(case, tensors)
        loss = outputs[1].square().sum() + outputs[5].sum()
        leaves = list(tensors.values())
        results[kernels] = torch.autograd.grad(loss, leaves, allow_unused=True)
    errors = {}
    for name, one, other in zip(tensors, results["triton"], results["reference"], strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            errors[name] = relative_error(one, other)
    return {name: error for name, error in errors.items() if not error <= 2e-6}


def check_layouts() -> dict[str, float]:
    """Rows that do not lie one after the other, as arguments and as what was saved; also views."""
    case = PhaseCase(3, (2, 1), (2, 3, 48))
    tensors = case.tensors(torch.float32)

    def apart(tensor: Tensor) -> Tensor:
        return torch.stack([tensor.detach()] * 2, -1)[..., 0]

    strided = {name: apart(tensor).requires_grad_() for name, tensor in tensors.items()}
    kept = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, apart)
    results = []
    for given, saving in ((tensors, nullcontext()), (strided, nullcontext()), (tensors, kept)):
        with saving:
            outputs = by_phases("triton")(case, given)
            total = sum(output.sum() for output in outputs)
            results.append(torch.autograd.grad(total, list(given.values()), allow_unused=True))
    for one, *others in zip(*results, strict=True):
        for other in others:
            assert other is None if one is None else torch.equal(one, other)
    return {}


def check_opcheck() -> dict[str, float]:
    for check in ("opcheck_complete", "opcheck_phase1", "opcheck_phase2"):
        getattr(test_phases, check)("triton")
    return {}


CHECKS: dict[str, Callable[[], dict[str, float]]] = {
    "sharp": check_sharp,
    "direct": check_many_direct_sources,
    "liger": check_liger,
    "frozen": check_frozen,
    "missing": check_missing,
    "newest": check_newest,
    "layouts": check_layouts,
    "repeated": check_repeated,
    "opcheck": check_opcheck,
}


def round_to_nearest() -> None:
    """Have bfloat16 rounded as GPUs do; the interpreter cuts digits off."""
    convert = interpreter._convert_float

    def rounding(values: Any, source: tl.dtype, target: tl.dtype, mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, mode)
        flat = torch.from_numpy(values.reshape(-1).view("float32"))
        return flat.bfloat16().view(torch.uint16).numpy().reshape(values.shape)

    interpreter._convert_float = rounding


def prepare() -> None:
    round_to_nearest()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    assert launch.interpreted()
    launch.allocate = poison


def main() -> None:
    prepare()
    for name in sys.argv[1:]:
        check, _, dtype = name.partition(":")
        found = check_sizes(check, getattr(torch, dtype)) if dtype else CHECKS[check]()
        print(json.dumps([name, found]), flush=True)


if __name__ == "__main__":
    main()
