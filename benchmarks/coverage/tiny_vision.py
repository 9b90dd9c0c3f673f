"""Small inputs for the models of timm and torchvision, built with random weights.

These libraries have no configs, so a model keeps its width; of equal blocks in a row it keeps two
(`shallow`), and its image is made small where it allows that. Of timm one model per architecture is
taken, the one with the shortest name among the smallest variants.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from shallow import make_shallow

MOST_PARAMETERS = 120_000_000
BATCH = 2
_SMALLER = ("atto", "femto", "pico", "nano", "test", "xxs", "tiny", "xs", "small")
_SIDES = (64, 128, 192, 224, 256)


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
    for name in timm_models()[module][:3]:
        for side in _SIDES:
            settings: dict[str, Any] = {"pretrained": False}
            try:
                model = _made(lambda n=name, s=settings, i=side: _timm(timm, n, s, i))
                kwargs = _image(model, side)
                return model, kwargs, f"{name}, {side} pixels{_cut(model, kwargs)}"
            except Exception as error:  # an image of another size, or a model too large
                failures.append(f"{name}, {side}: {_line(error)}")
    raise ValueError("; ".join(failures[:2]))


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
    for side in (64, 128, 224):
        try:
            model = _made(lambda: models.get_model(name, **settings))
            kwargs = _arguments(model, kind, side)
            return model, kwargs, f"{side} pixels{_cut(model, kwargs)}"
        except Exception as error:
            failures.append(f"{side}: {_line(error)}")
    raise ValueError("; ".join(failures))


def _timm(timm: Any, name: str, settings: dict[str, Any], side: int) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, img_size=side, **settings)
    except TypeError:  # it has no such option: convolutions take any size
        model = timm.create_model(name, **settings)
    return model


def _made(make: Any) -> nn.Module:
    try:
        with torch.device("meta"):
            count = sum(p.numel() for p in make().parameters())
    except NotImplementedError:  # it reads numbers while it is made, as torchvision's RegNet does
        count = 0
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count:,} parameters are too many")
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


def _cut(model: nn.Module, kwargs: dict[str, Any]) -> str:
    """Makes a model shallow, and says so."""

    def run() -> None:
        with torch.no_grad():
            model(**kwargs)

    return ", two blocks of each kind" if make_shallow(model, run) else ""


def _likely_size(name: str) -> tuple[int, int, str]:
    place = next((i for i, word in enumerate(_SMALLER) if word in name), len(_SMALLER))
    return place, len(name), name


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:160]}"
