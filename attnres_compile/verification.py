"""Does a converted model compute what the original does? Outputs and gradients, side by side."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from attnres_compile.comparing import (
    Args,
    Comparison,
    Kwargs,
    Run,
    compare,
    run,
)
from attnres_compile.errors import AttnResError, InputError
from attnres_compile.inputs import infer_inputs
from attnres_compile.inspection import plans_in, unwrapped
from attnres_compile.module import AttnRes, owners

if TYPE_CHECKING:
    from rich.console import RenderableType

_SMALLEST_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
_ROUNDINGS = 8  # eps that a site may cost
_ROUNDED_CARRIER = 1e-6  # in float64, for a model that rounds its stream to float32
_SHORT_DTYPES = (torch.float16, torch.bfloat16)
_WORKING_DTYPES = (torch.float64, torch.float32, *_SHORT_DTYPES)


@dataclass(frozen=True)
class VerifyReport:
    """How far a converted model is from the original. Printing it gives a table.

    Attributes:
        model: the model's class name.
        num_sites: sites with several sources, which the tolerance depends on.
        comparisons: every output and every gradient, in the model's dtype and in float64.
        notes: sentences on what was left out, and on reasons to expect a difference.
    """

    model: str
    num_sites: int
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether everything compared is within its tolerance, and anything was compared."""
        return bool(self.comparisons) and all(each.passed for each in self.comparisons)

    @property
    def rule(self) -> str:
        """How errors are measured and what is allowed, in words."""
        return (
            "Errors are relative to the largest magnitude expected; those of gradients to at least "
            "0.001, or sqrt(eps), of the model's largest gradient. Allowed: "
            f"{_ROUNDINGS} eps sqrt({self.num_sites} sites), and at least 1e-05 in float32, 1e-10 "
            "in float64, and in 16 bits twice the original's own distance from its float64 run."
        )

    def to_json(self) -> dict[str, Any]:
        """The report as a dictionary of JSON values; errors that are not finite become null."""
        comparisons = [
            {
                **dataclasses.asdict(c),
                **_finite(absolute=c.absolute, relative=c.relative),
                "passed": c.passed,
            }
            for c in self.comparisons
        ]
        return {
            "model": self.model,
            "passed": self.passed,
            "num_sites": self.num_sites,
            "rule": self.rule,
            "comparisons": comparisons,
            "notes": list(self.notes),
        }

    def __rich__(self) -> RenderableType:
        from attnres_compile.rendering import render_report

        return render_report(self)

    def __str__(self) -> str:
        from attnres_compile.rendering import to_text

        return to_text(self)


def verify(
    model: nn.Module,
    converted: nn.Module,
    args: Args = (),
    kwargs: Kwargs | None = None,
    *,
    float64: bool = True,
) -> VerifyReport:
    """Compares a converted model with its original on one call, forward and backward.

    Both are copied, run in their present mode after the same seed, and differentiated through a
    random projection of all their floating outputs. Neither is changed. Then the same is done in
    float64, where a wrong conversion cannot hide behind rounding. One copy is alive at a time, with
    its gradients beside those of the other.

    Args:
        model: the original.
        converted: what `convert` made of it, sharing its weights or not.
        args, kwargs: inputs of the call; inferred where the model says what it takes.
        float64: also compare in float64. A model that cannot run there is compared in its own
            dtype only, which a note says.

    Returns:
        The report. With trained queries or ``aggregate="mean"`` a difference is to be expected; it
        is reported all the same, with a note.

    Raises:
        InputError: the two do not belong together, or lie on the meta device.

    Example:
        >>> import attnres_compile, torchvision
        >>> model = torchvision.models.convnext_tiny().eval()
        >>> attnres_compile.verify(model, attnres_compile.convert(model)).passed
        True
    """
    model, converted = unwrapped(model), unwrapped(converted)
    new = _new_parameters(model, converted)
    if not args and not kwargs:
        args, kwargs = infer_inputs(model)
    num_sites = sum(name.endswith(".query") for name in new)
    dtype = _working_dtype(model)
    expected = run(copy.deepcopy(model), args, kwargs or {})
    actual = run(copy.deepcopy(converted), args, kwargs or {})
    comparisons = compare(expected, actual, dtype, tolerance(dtype, num_sites))
    notes = _notes(model, converted, new)
    if float64 and dtype != torch.float64:
        runs = _runs_in_float64(model, converted, args, kwargs or {})
        if isinstance(runs, str):
            notes.append(f"not compared in float64, where {runs}.")
        else:
            exact, _ = runs
            if dtype in _SHORT_DTYPES:
                comparisons = _allow_own_rounding(comparisons, exact, expected, dtype)
            allowed, remarks = _tolerance_in_float64(model, args, kwargs or {}, runs, num_sites)
            comparisons += compare(*runs, torch.float64, allowed)
            notes += remarks
    return VerifyReport(type(model).__name__, num_sites, tuple(comparisons), tuple(notes))


def tolerance(dtype: torch.dtype, num_sites: int) -> float:
    """The relative error that is allowed: ``8 eps sqrt(sites)``, and at least a floor.

    The residual sum and the mix round in different places, by about an eps of the dtype per site,
    and independent roundings add up like the steps of a random walk. The branches in between
    amplify these differences; so at least 1e-5 is allowed in float32 and 1e-10 in float64, while a
    wrong conversion is off by more than 1e-3. (In 16 bits a branch can amplify them without bound,
    as a ReLU at zero does; there `verify` measures what rounding does to the original itself.)

    Example:
        >>> tolerance(torch.float32, 64), tolerance(torch.bfloat16, 4)
        (1e-05, 0.125)
    """
    derived = _ROUNDINGS * torch.finfo(dtype).eps * math.sqrt(num_sites)
    return max(derived, _SMALLEST_TOLERANCE.get(dtype, 0.0))


def _new_parameters(model: nn.Module, converted: nn.Module) -> list[str]:
    """Names that only `converted` has, if it can be a conversion of `model`."""
    name = type(model).__name__
    base = dict(model.named_parameters())
    parameters = dict(converted.named_parameters())
    missing = [n for n in base if n not in parameters]
    if missing:
        raise InputError(
            f"the second model is no conversion of this {name}: it has no parameter {missing[0]}."
        )
    new = [n for n in parameters if n not in base]
    if not any(n.endswith(".query") for n in new):
        raise InputError(
            f"the second {type(converted).__name__} has no Attention Residuals; call "
            "verify(model, converted) with the original and with what convert(model) returned."
        )
    if any(p.is_meta for p in (*base.values(), *parameters.values())):
        raise InputError(
            f"weights of this {name} lie on the meta device, where nothing is computed; load real "
            "weights before you verify."
        )
    return new


def _notes(model: nn.Module, converted: nn.Module, new: list[str]) -> list[str]:
    """Reasons to expect a difference."""
    notes = []
    parameters = dict(converted.named_parameters())
    trained = [n for n in new if n.endswith(".query") and bool(parameters[n].any())]
    if trained:
        notes.append(
            f"queries are trained ({len(trained)} are not zero); equality is not expected."
        )
    if any(plan.config.aggregate == "mean" for _, plan in plans_in(converted)):
        notes.append(
            'with aggregate="mean" only scale-invariant readers see the same function, and they '
            'up to the eps of their norm; aggregate="sum" is lossless for every reader.'
        )
    changed = [n for n, p in model.named_parameters() if _differs(p, parameters[n])]
    if changed:
        notes.append(f"{len(changed)} base weights are not the original's (first: {changed[0]}).")
    if _has_active_dropout(model) and _is_lowered(converted):
        notes.append("compiled dropout draws other masks than eager dropout; verify in eval mode.")
    return notes


def _differs(original: Tensor, other: Tensor) -> bool:
    if original is other or is_traceable_wrapper_subclass(original):
        return False
    return original.shape != other.shape or not torch.equal(original, other.to(original))


def _has_active_dropout(model: nn.Module) -> bool:
    dropouts = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    return any(dropout.training and dropout.p > 0 for dropout in dropouts)


def _is_lowered(converted: nn.Module) -> bool:
    parts = [owner.attnres for _, owner in owners(converted)]
    return any(isinstance(part, AttnRes) and part.executor != "eager" for part in parts)


def _working_dtype(model: nn.Module) -> torch.dtype:
    """The coarsest dtype that the model computes in, autocast included."""
    parameters = [p for p in model.parameters() if p.dtype in _WORKING_DTYPES]
    dtypes = {p.dtype for p in parameters} or {torch.get_default_dtype()}
    for device in {p.device.type for p in parameters}:
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtypes.add(torch.get_autocast_dtype(device))
    return _coarsest(dtypes)


def _coarsest(dtypes: set[torch.dtype]) -> torch.dtype:
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _runs_in_float64(
    model: nn.Module, converted: nn.Module, args: Args, kwargs: Kwargs
) -> tuple[Run, Run] | str:
    """Both runs, or the reason why there are none."""
    args, kwargs = _inputs_in_float64(args, kwargs)
    with _no_autocast(model):
        try:
            expected = run(_in_float64(model), args, kwargs)
        except Exception as error:  # quantised weights, kernels without float64: not ours to judge
            return f"the original does not run ({_cause(error)})"
        try:
            return expected, run(_in_float64(converted), args, kwargs)
        except AttnResError as error:
            return f"the converted model does not run ({_cause(error)})"


def _cause(error: Exception) -> str:
    first_line = str(error).strip().split("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {first_line}"


def _tolerance_in_float64(
    model: nn.Module, args: Args, kwargs: Kwargs, runs: tuple[Run, Run], num_sites: int
) -> tuple[float, list[str]]:
    """What is allowed, and a note if that is more because the model itself rounds more."""
    allowed = tolerance(torch.float64, num_sites)
    if all(each.passed for each in compare(*runs, torch.float64, allowed)):
        return allowed, []
    carrier = _carrier_dtype(model, args, kwargs)
    if carrier == torch.float64:
        return allowed, []
    allowed = max(_ROUNDED_CARRIER, torch.finfo(carrier).eps * math.sqrt(num_sites))
    return allowed, [
        f"the model rounds its residual stream to {carrier} in float64 too, where {allowed:.1e} is "
        "therefore allowed."
    ]


def _allow_own_rounding(
    comparisons: list[Comparison], exact: Run, rounded: Run, dtype: torch.dtype
) -> list[Comparison]:
    """Tolerances of at least twice what rounding does to the original itself."""
    own = compare(exact.cast_like(rounded), rounded, dtype, 0.0)
    errors = {(each.kind, each.name): each.relative for each in own}
    return [
        dataclasses.replace(each, tolerance=2 * errors[each.kind, each.name])
        if each.tolerance < 2 * errors.get((each.kind, each.name), 0.0) < math.inf
        else each
        for each in comparisons
    ]


def _carrier_dtype(model: nn.Module, args: Args, kwargs: Kwargs) -> torch.dtype:
    """The coarsest dtype of a residual stream of the model in float64."""
    from attnres_compile.planning import plan
    from attnres_compile.stream_plans import stream_dtype

    try:
        with _no_autocast(model):
            streams = plan(_in_float64(model), *_inputs_in_float64(args, kwargs)).streams
    except AttnResError:
        return torch.float64
    return _coarsest({torch.float64, *(stream_dtype(stream) for stream in streams)})


def _in_float64(model: nn.Module) -> nn.Module:
    """A copy in float64."""
    duplicate: Any = copy.deepcopy(model)
    experts = getattr(duplicate, "get_experts_implementation", None)
    if experts is not None and "grouped_mm" in experts().values():
        # transformers' default for mixtures of experts has no float64 kernel
        duplicate.set_experts_implementation("batched_mm")
    widened: nn.Module = duplicate.double()
    return widened


def _inputs_in_float64(args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    def widen(leaf: Tensor) -> Tensor:
        return leaf.double() if leaf.is_floating_point() else leaf

    widened: tuple[Args, Kwargs] = pytree.tree_map_only(Tensor, widen, (args, dict(kwargs)))
    return widened


@contextlib.contextmanager
def _no_autocast(model: nn.Module) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for device in {p.device.type for p in model.parameters()}:
            if torch.amp.is_autocast_available(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _finite(**errors: float) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in errors.items()}
