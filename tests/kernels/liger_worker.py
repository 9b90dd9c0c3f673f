"""Prints, as JSON, how far the specification and Liger's kernel lie apart.

Triton reads TRITON_INTERPRET when it is imported, so test_liger.py runs this in its own process.
"""

import json

import torch
from liger_kernel.ops.attn_res import LigerAttnResFunction
from torch import Tensor

from attnres_compile.kernels import reference
from mix_cases import Mix, make_case
from tolerances import relative_error


def liger_mix(
    sources: list[Tensor], query: Tensor, gain: Tensor | None, *, eps: float, **_: object
) -> Tensor:
    return LigerAttnResFunction.apply(torch.stack(sources), query, gain, eps)


def without_gain(
    sources: list[Tensor], query: Tensor, gain: Tensor, *, eps: float, **_: object
) -> Tensor:
    return liger_mix(sources, query, torch.ones_like(gain) + 0 * gain, eps=eps)


def errors(num_sources: int, width: int, other: Mix) -> dict[str, float]:
    """The relative errors of the result and of every gradient, by name."""
    case = make_case(num_sources, (2, 2, width), aggregate="mean")
    expected = case.run(other)
    return {
        name: relative_error(result, expected[name])
        for name, result in case.run(reference.mix).items()
    }


def main() -> None:
    found = {
        f"{num_sources} sources of width {width}": errors(num_sources, width, liger_mix)
        for num_sources in (1, 3, 9)
        for width in (64, 96)
    }
    found["gain left out"] = errors(3, 64, without_gain)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
