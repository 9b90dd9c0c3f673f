"""Small inputs for the models of timm and torchvision, built with random weights.

These libraries have no configs, so a model keeps its width; of equal blocks in a row it keeps two
(`shallow`), and its image is made small where it allows that. Of timm one model per architecture is
taken: of those whose names say that they are small, the first that has equal blocks in a row, and
these in as few lists as another's. For what repeats inside a block alone tells nothing of blocks.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from shallow import KEPT, depth_of_repeats, make_shallow

MOST_PARAMETERS = 240_000_000  # once it is shallow: RegNet-Y 128GF keeps 232 million
_MOST_BUILT = 700_000_000
BATCH = 2
_SMALLER = ("atto", "femto", "pico", "nano", "test", "xxs", "tiny", "xs", "small")
_SMALLER_WORDS = {"s", "s0", "t", "t0"}
_LARGER = ("base", "large", "huge", "giant", "_m", "_l", "_xl")
_SIDES = (64, 128, 192, 224, 240, 256)
_TRIED, _OTHERS = 12, 3  # models of a module of timm: looked at, and built if the first fails


@functools.cache
def timm_models() -> dict[str, tuple[str, ...]]:
    """By module of timm (``vision_transformer``): its models, the likely smallest first."""
    import timm

    found: dict[str, tuple[str, ...]] = {}
    for module in timm.list_modules():
        names = timm.list_models(module=module)
        if names:
            found[module] = tuple(sorted(names, key=_likely_size))
    return found


@functools.cache
def torchvision_models() -> dict[str, str]:
    """By name of a model: its kind, as classification, segmentation, detection, video."""
    from torchvision import models

    kinds = {
        "segmentation": models.segmentation,
        "detection": models.detection,
        "video": models.video,
        "optical_flow": models.optical_flow,
    }
    found = dict.fromkeys(models.list_models(module=models), "classification")
    for kind, module in kinds.items():
        found.update(dict.fromkeys(models.list_models(module=module), kind))
    return found


def build_timm(module: str) -> tuple[nn.Module, dict[str, Any], str]:
    """The smallest model of a module of timm in evaluation mode, and an image for it.

    Raises:
        ValueError: none of its first models runs.
    """
    import timm

    failures: list[str] = []
    for name in _with_repeats_first(timm_models()[module]):
        for side in _SIDES:
            settings: dict[str, Any] = {"pretrained": False}
            try:
                model = _made(lambda n=name, s=settings, i=side: _timm(timm, n, s, i))
                return model, *_shallow(model, _image(model, side), f"{name}, {side} pixels")
            except Exception as error:  # an image of another size, or a model too large
                failures.append(f"{name}, {side}: {_line(error)}")
    raise ValueError("; ".join(failures[:2]))


def _with_repeats_first(names: Sequence[str]) -> list[str]:
    depths: dict[str, int] = {}
    for name in names[:_TRIED]:
        depth = _depth_of_repeats(name)
        if depth is not None:
            depths[name] = depth
        if depth == 1:
            break
    first = min(depths, key=depths.__getitem__, default=names[0])
    return [first, *(name for name in names[:_OTHERS] if name != first)]


def _depth_of_repeats(name: str) -> int | None:
    """Of a model of timm; None too where it is too large to be built."""
    import timm

    with torch.device("meta"):
        try:
            model = timm.create_model(name, pretrained=False)
        except NotImplementedError:  # it reads numbers while it is made
            return None
    return depth_of_repeats(model) if _number_of_parameters(model) <= _MOST_BUILT else None


def build_torchvision(name: str) -> tuple[nn.Module, dict[str, Any], str]:
    """A model of torchvision in evaluation mode, and inputs for it.

    Raises:
        ValueError: it does not run on a small image either.
    """
    from torchvision import models

    kind = torchvision_models()[name]
    settings: dict[str, Any] = {"weights": None}
    if kind in ("segmentation", "detection"):
        settings["weights_backbone"] = None
    failures = []
    model = _made(lambda: models.get_model(name, **settings))
    for side in (64, 128, 224):
        try:
            return model, *_shallow(model, _arguments(model, kind, side), f"{side} pixels")
        except Exception as error:
            failures.append(f"{side}: {_line(error)}")
    raise ValueError("; ".join(failures))


def _timm(timm: Any, name: str, settings: dict[str, Any], side: int) -> nn.Module:
    """Of this image size and of two layers, as far as it has options for them."""
    size, depth = {"img_size": side}, {"depth": KEPT}
    for options in (size | depth, size, depth):
        with contextlib.suppress(TypeError, ValueError, AssertionError):  # it has no such option
            return cast(nn.Module, timm.create_model(name, **settings, **options))
    return cast(nn.Module, timm.create_model(name, **settings))


def _made(make: Any) -> nn.Module:
    try:
        with torch.device("meta"):
            count = _number_of_parameters(make())
    except NotImplementedError:  # it reads numbers while it is made, as torchvision's RegNet does
        count = 0
    _check_size(count, _MOST_BUILT)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = make().eval()
    return model


def _image(model: nn.Module, side: int) -> dict[str, Any]:
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    return _accepted(model, (torch.randn(BATCH, 3 if channels > 4 else channels, side, side),))


def _arguments(model: nn.Module, kind: str, side: int) -> dict[str, Any]:
    if kind == "video":
        return _accepted(model, (torch.randn(BATCH, 3, 16, side, side),))
    if kind == "detection":
        return _accepted(model, ([torch.rand(3, side, side) for _ in range(BATCH)],))
    if kind == "optical_flow":
        side = max(side, 128)
        return _accepted(
            model, (torch.rand(BATCH, 3, side, side), torch.rand(BATCH, 3, side, side))
        )
    return _accepted(model, (torch.randn(BATCH, 3, side, side),))


def _accepted(model: nn.Module, values: tuple[Any, ...]) -> dict[str, Any]:
    """The values by the names of forward's arguments, once the model has run on them."""
    import inspect

    names = list(inspect.signature(model.forward).parameters)
    kwargs = dict(zip(names, values, strict=False))
    with torch.no_grad():
        model(**kwargs)
    return kwargs


def _shallow(model: nn.Module, kwargs: dict[str, Any], recipe: str) -> tuple[dict[str, Any], str]:
    """Makes a model shallow, and says so in the recipe."""

    def run() -> None:
        with torch.no_grad():
            model(**kwargs)

    if make_shallow(model, run):
        recipe += ", two blocks of each kind"
    _check_size(_number_of_parameters(model), MOST_PARAMETERS)
    return kwargs, recipe


def _number_of_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _check_size(count: int, most: int) -> None:
    if count > most:
        raise ValueError(f"{count:,} parameters are too many")


def _likely_size(name: str) -> tuple[int, int, str]:
    """Smaller ones first, then those whose names say nothing, then larger ones."""
    place = next((i for i, word in enumerate(_SMALLER) if word in name), len(_SMALLER))
    if place == len(_SMALLER) and not _SMALLER_WORDS & {*name.split("_")}:
        place += 1 + any(word in name for word in _LARGER)
    return place, len(name), name


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:160]}"
