"""The function ``attnres::Mix<n>`` against the specification, in ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from attnres_compile.kernels import reference
from attnres_compile.passes.onnx_mix import (
    DOMAIN,
    DOMAIN_VERSION,
    mix_attributes,
    mix_function,
    mix_node,
)

ELEMENTS = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.float16: TensorProto.FLOAT16,
}
TOKENS, IMAGES = (2, 3, 8), (2, 8, 4, 5)


def mixed(
    sources: list[torch.Tensor],
    query: torch.Tensor,
    gain: torch.Tensor | None,
    *,
    dim: int,
    eps: float,
    sums: bool,
    opset: int,
) -> torch.Tensor:
    """One call of the function, in a model of its own that passes ONNX's strict checks."""
    feeds = {f"s{i}": source for i, source in enumerate(sources)} | {"q": query}
    names = list(feeds)[:-1]
    if gain is not None:
        feeds["g"] = gain
    settings = mix_attributes(
        len(sources),
        channel_dim=dim,
        rank=sources[0].dim(),
        double=query.dtype == torch.float64,
        eps=eps,
        sums=sums,
    )
    node = mix_node(names, "q", "g" if gain is not None else None, "out", settings)
    element = ELEMENTS[query.dtype]
    inputs = [helper.make_tensor_value_info(n, element, v.shape) for n, v in feeds.items()]
    output = helper.make_tensor_value_info("out", element, sources[0].shape)
    model = helper.make_model(
        helper.make_graph([node], "one", inputs, [output]),
        functions=[mix_function(len(sources), gain=gain is not None, opset=opset)],
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)],
        ir_version=8,
    )
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    result: Any = session.run(None, {name: value.numpy() for name, value in feeds.items()})
    return torch.from_numpy(np.array(result[0]))


def arguments(
    count: int, shape: tuple[int, ...], dim: int, dtype: torch.dtype
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    sources = [torch.randn(shape, dtype=torch.float64).to(dtype) * (i + 1) for i in range(count)]
    query = torch.randn(shape[dim], dtype=torch.float64).to(dtype)
    return sources, query, 1 + 0.3 * torch.randn(shape[dim], dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("opset", [17, 18, 20, 23])
@pytest.mark.parametrize(("shape", "dim"), [(TOKENS, -1), (IMAGES, 1)])
@pytest.mark.parametrize("count", [2, 5])
def test_float64_agrees_with_the_reference(
    count: int, shape: tuple[int, ...], dim: int, opset: int
) -> None:
    sources, query, gain = arguments(count, shape, dim, torch.float64)
    for given in (gain, None):
        for aggregate in ("sum", "mean"):
            actual = mixed(
                sources, query, given, dim=dim, eps=0.1, sums=aggregate == "sum", opset=opset
            )
            expected = reference.mix(sources, query, given, eps=0.1, aggregate=aggregate, dim=dim)
            # eps is an attribute, hence a float32
            torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_arithmetic_is_float32(dtype: torch.dtype) -> None:
    sources, query, gain = arguments(3, TOKENS, -1, dtype)
    # squares of 300 are beyond float16, in which the mean square would be infinite
    sources = [300 * source for source in sources]
    actual = mixed(sources, query, gain, dim=-1, eps=1e-6, sums=True, opset=17)
    expected = reference.mix(sources, query, gain, eps=1e-6, aggregate="sum")
    assert actual.dtype == dtype
    tolerance = 2e-3 if dtype == torch.float16 else 1e-5
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_zero_query_adds_the_sources_up() -> None:
    sources, query, gain = arguments(3, TOKENS, -1, torch.float32)
    actual = mixed(sources, 0 * query, gain, dim=-1, eps=1e-6, sums=True, opset=17)
    torch.testing.assert_close(actual, sources[0] + sources[1] + sources[2], rtol=1e-6, atol=1e-6)


def test_every_argument_matters() -> None:
    sources, query, gain = arguments(3, TOKENS, -1, torch.float64)
    settings: dict[str, Any] = {"dim": -1, "eps": 1e-6, "sums": True, "opset": 17}
    base = mixed(sources, query, gain, **settings)
    others = [
        mixed(sources[::-1], -query, gain, **settings),
        mixed(sources, query, None, **settings),
        mixed(sources, query, gain, **{**settings, "eps": 0.5}),
        mixed(sources, query, gain, **{**settings, "sums": False}),
        mixed(sources[:2], query, gain, **settings),
    ]
    assert all(float((other - base).abs().max()) > 1e-3 for other in others)
