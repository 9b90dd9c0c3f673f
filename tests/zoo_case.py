"""What a model of the zoo is made of, and the helpers that every test over the zoo needs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
SEED = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A tiny model, inputs for it, and what a person reads in its source.

    The numbers are counted by hand: `depths` has one entry per residual stream that is long enough
    to be converted (two sublayers or more), its number of residual additions, in the order in which
    the streams begin; `sublayers` the number of maximal runs of additions with no read in between.
    """

    name: str
    make_model: Callable[[], nn.Module]
    make_inputs: Callable[[], Inputs]
    residual_additions: int
    depths: tuple[int, ...]
    sublayers: tuple[int, ...]
    counted_in: str
    channel_dim: int = -1
    float64_tolerance: float = 1e-10
    has_cache: bool = False
    # Chains of a single sublayer: seen, listed as refusals, not part of the numbers above.
    too_short: int = 0
    # A key phrase of the reason for which the whole model is refused; empty if it converts.
    refused: str = ""

    @property
    def streams(self) -> int:
        return len(self.depths)

    def build(self) -> nn.Module:
        """A model in eval mode and float32 whose every part matters to the output."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = self.make_model().float().eval()
            perturb(model)
        return model

    def inputs(self, *, use_cache: bool = False) -> Inputs:
        """Positional and keyword arguments; `use_cache` only concerns a case with `has_cache`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED + 1)
            args, kwargs = self.make_inputs()
        if self.has_cache:
            kwargs = {**kwargs, "use_cache": use_cache}
        return args, kwargs

    def __str__(self) -> str:
        return self.name


def case_ids(cases: tuple[Case, ...]) -> list[str]:
    return [case.name for case in cases]


def perturb(model: nn.Module) -> None:
    """Add noise to every parameter, since many initialisations hide a branch.

    Layer scales of 1e-6, zero gates and embeddings with a standard deviation of 0.02 make a
    network almost the identity, in which a wrong conversion would not show.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = math.prod(parameter.shape[1:]) if parameter.ndim > 1 else 4
            parameter += torch.randn_like(parameter) * (0.7 / math.sqrt(fan_in))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean += torch.randn_like(module.running_mean) * 0.2
                module.running_var *= 0.5 + torch.rand_like(module.running_var)


def to_float64(tree: Any) -> Any:
    """A module in place, or a copy of nested inputs, with floating tensors in double precision."""
    if isinstance(tree, nn.Module):
        if hasattr(tree, "get_experts_implementation"):
            # The default for mixtures of experts, a grouped matrix product, knows no float64.
            implementations = tree.get_experts_implementation().values()  # type: ignore[operator]
            if "grouped_mm" in implementations:
                tree.set_experts_implementation("batched_mm")  # type: ignore[operator]
        return tree.double()
    return pytree.tree_map_only(
        torch.Tensor, lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, tree
    )


def float_outputs(output: Any) -> list[torch.Tensor]:
    """The floating tensors of any output: ModelOutput, tuples, dicts, a key-value cache."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        return [tensor for value in output.values() for tensor in float_outputs(value)]
    if isinstance(output, (tuple, list)):
        return [tensor for value in output for tensor in float_outputs(value)]
    if hasattr(output, "__dict__") and type(output).__name__.endswith(("Cache", "Layer")):
        return float_outputs(vars(output))
    return []


def tokens(batch: int = 2, length: int = 7, vocabulary: int = 96) -> torch.Tensor:
    """Token ids that avoid 0 to 3, which configurations use for padding and the like."""
    return torch.randint(4, vocabulary, (batch, length))


def images(size: int = 32, batch: int = 2, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, size, size)
