"""One model through the whole of a conversion: plan, convert, verify, strip, one optimizer step."""

from __future__ import annotations

import contextlib
import copy
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import attnres_compile
import tiny_transformers
import tiny_vision
from attnres_compile.capture import capture
from attnres_compile.comparing import compare, named_tensors, run
from attnres_compile.config import AttnResConfig
from attnres_compile.errors import CaptureError
from attnres_compile.planning import plan_of_capture
from attnres_compile.plans import ConversionPlan
from attnres_compile.verification import tolerance

_MOST_NOISE = 5  # times that all parameters are changed
_NOISE_DRAWS = 6
_NOISES = 8.0  # times the effect of one rounding, and no more than this:
_LARGEST_NOISE = {torch.float32: 1e-4, torch.float64: 1e-6}
STATUSES = ("converted", "refused", "capture failed", "wrong", "not built", "out of time")


@dataclass
class Result:
    """What became of one model.

    Attributes:
        model, library, family: ``LlamaModel``, ``transformers``, ``llama``.
        status: one of `STATUSES`. ``wrong`` is a bug: a difference, or an error on the way.
        detail: the cause, in one sentence, where it was not converted; else the recipe.
        refusals: by kind, how many additions were refused; also beside streams that convert.
        reasons: by kind, the sentence and place of the first of them.
        seconds: of each step that ran.
        delta_sources: whether streams were looked for that this option is for.
    """

    model: str
    library: str
    family: str
    status: str = "not built"
    detail: str = ""
    refusals: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    streams: int = 0
    additions: int = 0
    sites: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    delta_sources: bool = False

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


Built = tuple[nn.Module, dict[str, Any], str]


def builder(library: str, name: str) -> tuple[str, Callable[[], Built]]:
    """The family of a model, and what makes it."""
    if library == "transformers":
        return tiny_transformers.family_of(name), lambda: tiny_transformers.build(name)
    if library == "timm":
        return name, lambda: tiny_vision.build_timm(name)
    if library == "torchvision":
        kind = tiny_vision.torchvision_models()[name]
        return kind, lambda: tiny_vision.build_torchvision(name)
    raise ValueError(f"no library {library!r}")


def check(library: str, name: str, *, delta_sources: bool = False) -> Result:
    """Builds a model and takes it through a conversion; never raises for what the model does."""
    family, make = builder(library, name)
    result = Result(name, library, family, delta_sources=delta_sources)
    try:
        with _timed(result, "build"):
            model, kwargs, result.detail = make()
            _perturb(model, kwargs)
    except Exception as error:
        result.detail = _sentence(error)
        return result
    step = "capture"
    try:
        for step, act in _steps(model, kwargs, result):
            with _timed(result, step):
                act()
    except CaptureError as error:
        result.status = "capture failed" if step == "capture" else "wrong"
        result.detail = f"{step}: {_sentence(error)}"
    except _Refused as refused:
        result.status, result.detail = "refused", str(refused)
    except Exception as error:
        result.status, result.detail = "wrong", f"{step}: {type(error).__name__}: {error}"[:600]
    else:
        result.status = "converted"
    return result


class _Refused(Exception):  # noqa: N818  an outcome
    """The plan has no stream."""


def _steps(
    model: nn.Module, kwargs: dict[str, Any], result: Result
) -> Iterator[tuple[str, Callable[[], None]]]:
    """The steps in order; each uses what the ones before it left in `found`."""
    found: dict[str, Any] = {}
    config = AttnResConfig(delta_sources=result.delta_sources)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def capturing() -> None:
        found["captured"] = capture(model, (), kwargs)

    def planning() -> None:
        found["plan"] = plan_of_capture(found.pop("captured"), model, config)

    def reading() -> None:
        _read_plan(found["plan"], result)

    def converting() -> None:
        found["converted"] = attnres_compile.convert(
            copy.deepcopy(model), (), kwargs, plan=found["plan"]
        )

    def verifying() -> None:
        # In one dtype and without a copy, so that the gradients serve the optimizer's step too.
        expected = run(copy.deepcopy(model), (), kwargs)
        allowed = tolerance(torch.float32, result.sites)
        actual = run(found["converted"], (), kwargs)
        if not all(c.passed for c in compare(expected, actual, torch.float32, allowed)):
            _check_in_float64(model, found["converted"], kwargs)
        if not expected.outputs:
            raise AssertionError("the model returned no tensor")

    def stripping() -> None:
        _check_same(attnres_compile.strip(found["converted"]).state_dict(), before)

    def stepping() -> None:
        _take_a_step(found["converted"])

    yield from (
        ("capture", capturing),
        ("plan", planning),
        ("refusals", reading),
        ("convert", converting),
        ("verify", verifying),
        ("strip", stripping),
        ("step", stepping),
    )


def _read_plan(plan: ConversionPlan, result: Result) -> None:
    kinds = Counter(refusal.kind for refusal in plan.refusals)
    result.refusals = dict(kinds)
    for each in plan.refusals:
        place = f"{each.module_path or 'the model itself'}, {each.source}"
        result.reasons.setdefault(each.kind, f"{each.reason} ({place})")
    result.streams = len(plan.streams)
    result.additions = plan.num_residual_additions
    result.sites = sum(len(stream.sites) for stream in plan.streams)
    if not plan.streams:
        raise _Refused(plan.explain_refusals() or "no residual addition found")


def _check_in_float64(model: nn.Module, converted: nn.Module, kwargs: dict[str, Any]) -> None:
    """Where float32 does not settle it: a model may amplify roundings, a wrong result stays.

    What roundings are worth, where float64 does not settle it either or the model does not run in
    it, is what noise of one unit in the last place of every parameter changes in the model itself.
    """
    report = attnres_compile.verify(model, converted, (), kwargs)
    exact = [each for each in report.comparisons if each.dtype == "float64"]
    judged = exact or list(report.comparisons)
    failed = [each for each in judged if not each.passed]
    if failed:
        noise = _noise(model, kwargs, torch.float64 if exact else torch.float32)
        failed = [each for each in failed if not each.relative <= noise[each.kind]]
    if failed:
        worst = max(failed, key=lambda c: math.inf if math.isnan(c.relative) else c.relative)
        raise AssertionError(
            f"{len(failed)} of {len(judged)} differ, worst {worst.kind} {worst.name} by "
            f"{worst.relative:.1e} in {worst.dtype}"
        )


def _noise(model: nn.Module, kwargs: dict[str, Any], dtype: torch.dtype) -> dict[str, float]:
    """For outputs and for gradients: a few times what one unit in the last place changes.

    Where a ReLU's input is all but zero, only some of the draws show it. Nothing is excused that
    is off by more than `_LARGEST_NOISE`.
    """
    plain = copy.deepcopy(model).to(dtype)
    inputs = {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in kwargs.items()
    }
    expected = run(copy.deepcopy(plain), (), inputs)
    largest = {"output": 0.0, "gradient": 0.0}
    for seed in range(_NOISE_DRAWS):
        actual = run(_shaken(plain, seed), (), inputs)
        for each in compare(expected, actual, dtype, 0.0):
            worth = min(_NOISES * each.relative, _LARGEST_NOISE[dtype])
            largest[each.kind] = max(largest[each.kind], worth)
    return largest


def _shaken(model: nn.Module, seed: int) -> nn.Module:
    """A copy with noise of one unit in the last place, either way or none, on every parameter."""
    shaken = copy.deepcopy(model)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parameter in shaken.parameters():
            ulps = torch.randint(-1, 2, parameter.shape).to(parameter)
            parameter *= 1 + ulps * torch.finfo(parameter.dtype).eps
    return shaken


def _check_same(stripped: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    if stripped.keys() != before.keys():
        raise AssertionError(f"other names, {sorted(stripped.keys() ^ before.keys())[:3]}")
    for name, tensor in before.items():
        if not torch.equal(stripped[name].view(-1), tensor.view(-1)) and not _both_nan(
            stripped[name], tensor
        ):
            raise AssertionError(f"{name} differs")


def _both_nan(left: Tensor, right: Tensor) -> bool:
    return bool(torch.equal(torch.nan_to_num(left), torch.nan_to_num(right)))


def _take_a_step(converted: Any) -> None:
    """SGD on all parameters: every query and gain has a finite gradient, and queries move."""
    sites = [site for stream in converted.plan.streams for site in stream.sites]
    names = [site.query_name for site in sites if site.query_name is not None]
    parameters = dict(converted.named_parameters())
    for name in names:
        gradient = parameters[name].grad
        if gradient is None or not bool(torch.isfinite(gradient).all()):
            raise AssertionError(f"no finite gradient of {name}")
    torch.optim.SGD(converted.parameters(), lr=1e-3).step()
    if not any(bool(parameters[name].any()) for name in names):
        raise AssertionError("no query has moved")


def _perturb(model: nn.Module, kwargs: dict[str, Any]) -> None:
    """Noise on every parameter: layer scales of 1e-6 and zero gates would hide a wrong branch.

    So would a last ReLU that lets nothing through: then there is more noise.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for _ in range(_MOST_NOISE):
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    fan_in = math.prod(parameter.shape[1:]) if parameter.ndim > 1 else 16
                    parameter += torch.randn_like(parameter) * (0.3 / math.sqrt(max(fan_in, 1)))
            outputs = dict(named_tensors(model(**kwargs)))
            if any(bool(output.any()) for output in outputs.values()):
                return


@contextlib.contextmanager
def _timed(result: Result, step: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        result.seconds[step] = round(time.perf_counter() - start, 3)


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    told = isinstance(error, CaptureError | ValueError)
    return (text if told else f"{type(error).__name__}: {text}")[:500]
