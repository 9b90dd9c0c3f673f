"""Tiny models as both of torch's exporters write them, beside their conversion in PyTorch."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import attnres_compile
from attnres_compile import AttnResConfig
from conversions import randomize
from zoo_case import SEED, perturb
from zoo_decoders import GPT2, LLAMA
from zoo_encoders import CONVNEXT, SWIN, T5, VIT, WHISPER

Feeds = dict[str, Tensor]


class FirstOutput(nn.Module):
    """A model of the transformers library with inputs by position and its first output alone."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *values: Tensor) -> Tensor:
        output: Any = self.model(**dict(zip(self.names, values, strict=True)))
        return output[0]


@dataclasses.dataclass(frozen=True)
class Export:
    """A model and the inputs to export it with.

    The number of sites with a query per stream is counted by hand: every depth but the root's.
    """

    name: str
    make: Callable[[], tuple[nn.Module, Feeds]]
    sites: tuple[int, ...]

    def build(self) -> tuple[nn.Module, Feeds]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return self.make()

    def __str__(self) -> str:
        return self.name


def _case(case: Any, sites: tuple[int, ...], **more: Tensor) -> Export:
    def make() -> tuple[nn.Module, Feeds]:
        model, (_, kwargs) = case.build(), case.inputs()
        feeds = {n: v for n, v in kwargs.items() if isinstance(v, Tensor)} | more
        return _wrapped(model, feeds)

    return Export(case.name, make, sites)


def _wrapped(model: Any, feeds: Feeds) -> tuple[nn.Module, Feeds]:
    model.config.use_cache = False
    # fused attention is what the exporters fail on when a size is dynamic
    model.set_attn_implementation("eager")
    return FirstOutput(model, list(feeds)).eval(), feeds


def _whisper_encoder() -> tuple[nn.Module, Feeds]:
    model: Any = WHISPER.build()
    return _wrapped(model.model.encoder, {"input_features": torch.randn(2, 8, 16)})


def _mobilenet() -> tuple[nn.Module, Feeds]:
    from torchvision.models import mobilenet_v2

    model = mobilenet_v2(width_mult=0.25, num_classes=5).eval()
    perturb(model)
    return model, {"x": torch.randn(2, 3, 32, 32)}


MASK = torch.ones(2, 7, dtype=torch.int64)
EXPORTS = (
    _case(LLAMA, (8,), attention_mask=MASK),  # without a mask both exporters trace `diff` in vain
    _case(GPT2, (8,), attention_mask=MASK),
    _case(T5, (6, 6)),
    _case(VIT, (6,)),
    Export("whisper_encoder", _whisper_encoder, (6,)),
    _case(CONVNEXT, (2, 2, 3, 2)),
    _case(SWIN, (4, 4)),
    Export("mobilenet_v2", _mobilenet, (2, 3, 2, 2)),
)


def export(model: nn.Module, feeds: Feeds, path: Path, *, dynamo: bool) -> Path:
    """Writes an ONNX file with dynamic batch, and sequence where the inputs are token ids."""
    axes = {
        name: {0: "batch"} if value.is_floating_point() else {0: "batch", 1: f"seq{value.shape[1]}"}
        for name, value in feeds.items()
    }
    options: dict[str, Any] = {"dynamic_axes": axes, "opset_version": 17}
    if dynamo:
        dynamic = [dict.fromkeys(each, torch.export.Dim.DYNAMIC) for each in axes.values()]
        shapes = (tuple(dynamic),) if isinstance(model, FirstOutput) else tuple(dynamic)
        options = {"dynamic_shapes": shapes, "external_data": False, "verbose": False}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _quiet_torch():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            copy.deepcopy(model),
            tuple(feeds.values()),
            str(path),
            dynamo=dynamo,
            input_names=list(feeds),
            **options,
        )
    return path


@contextlib.contextmanager
def _quiet_torch() -> Any:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def randomized(model: nn.Module, feeds: Feeds, config: AttnResConfig) -> Any:
    """The conversion in PyTorch, with random queries and gains."""
    converted = attnres_compile.convert(copy.deepcopy(model), tuple(feeds.values()), config=config)
    randomize(converted)
    return converted


def fill(path: Path, plan: Any, converted: Any) -> None:
    """Gives an ONNX conversion the queries and gains of one in PyTorch, site by site."""
    parameters = dict(converted.named_parameters())
    values = {}
    for stream, other in zip(plan.streams, converted.plan.streams, strict=True):
        assert [s.depth for s in stream.sites] == [s.depth for s in other.sites]
        for site, twin in zip(stream.sites, other.sites, strict=True):
            values[site.query_name] = twin.query_name
            values[site.gain_name] = twin.gain_name
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name in values:
            value = parameters[values[tensor.name]].detach().numpy()
            tensor.CopyFrom(numpy_helper.from_array(np.array(value), tensor.name))
    path.write_bytes(model.SerializeToString())
