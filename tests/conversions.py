"""Converted models with random queries, for tests of what happens to them afterwards.

At zero queries a converted model computes what the original does, so that a path on which the
Attention Residuals are silently missing would not show. Random queries make every output differ.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import attnres_compile
from oracle_cases import CASES, OracleCase, run_oracle
from oracle_mixer import Mixing, SiteKey, SiteParameters
from tolerances import relative_error

LLAMA: OracleCase = next(case for case in CASES if case.name == "llama")


def randomize(converted: nn.Module, seed: int = 3) -> None:
    """Queries with scores of order one, and gains around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in converted.named_parameters():
            if ".attnres." not in f".{name}":
                continue
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if name.endswith(".query"):
                parameter.copy_(noise * parameter.numel() ** -0.5)
            else:
                parameter.copy_(1 + 0.3 * noise)


def convert_randomized(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: Any = None, **options: Any
) -> Any:
    """A converted copy of a model, with random queries."""
    converted = attnres_compile.convert(copy.deepcopy(model), args, kwargs, **options)
    randomize(converted)
    return converted


def converted_llama(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The oracles' Llama, converted, with random queries."""
    _, kwargs = LLAMA.arguments(dtype)
    return convert_randomized(LLAMA.build(dtype), (), kwargs, **options)


def llama_inputs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return LLAMA.arguments(dtype)[1]


def sites_of(converted: Any) -> dict[SiteKey, SiteParameters]:
    """The numbers that a converted model has at its sites, in the form that oracles take."""
    parameters = dict(converted.named_parameters())
    sites = {}
    for stream in converted.plan.streams:
        for site in stream.sites:
            if site.query_name is not None:
                query, gain = parameters[site.query_name], parameters[site.gain_name]
                sites[stream.name, site.depth] = SiteParameters(
                    query.detach().clone(), gain.detach().clone()
                )
    return sites


def llama_oracle_logits(converted: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the hand-written Block AttnRes Llama computes with a converted Llama's weights."""
    plain = LLAMA.build(dtype)
    names = dict(plain.named_parameters())
    plain.load_state_dict({name: converted.state_dict()[name] for name in names})
    result = run_oracle(LLAMA, plain, Mixing(sites_of(converted)), dtype)
    return result.outputs["logits"].detach()


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return relative_error(actual, expected)
