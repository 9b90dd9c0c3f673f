"""Quantised base weights are left alone; a quantised stream is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attnres_compile
from attnres_compile.errors import NothingToConvertError
from conversions import randomize
from zoo import by_name, float_outputs


class Int8Linear(nn.Module):
    """A weight in int8 with a scale per row, dequantised at each call, as bitsandbytes does."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        weight, scale = self.get_buffer("weight"), self.get_buffer("scale")
        return F.linear(x, weight.to(x.dtype) * scale)


def with_int8_linears(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(module, name, Int8Linear(child))
    return model


def with_torchao(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


@pytest.mark.parametrize("quantize", [with_int8_linears, with_torchao])
def test_quantised_weights_convert(quantize: Any) -> None:
    case = by_name("llama")
    args, kwargs = case.inputs()
    model = quantize(case.build())
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = float_outputs(model(*args, **kwargs))[0]
        converted = attnres_compile.convert(model, args, kwargs)
        actual = float_outputs(converted(*args, **kwargs))[0]
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        randomize(converted)
        assert not torch.allclose(float_outputs(converted(*args, **kwargs))[0], expected)
    assert converted.plan.num_residual_additions == case.residual_additions
    assert [type(v) for v in model.state_dict().values()] == [type(v) for v in before.values()]


class QuantisedCarrier(nn.Module):
    """Rounds the stream itself to eight bits after every addition."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(F.layer_norm(x, (8,)))
            x = torch.fake_quantize_per_tensor_affine(x, 0.05, 0, -128, 127)
        return x


def test_a_quantised_stream_is_refused() -> None:
    x = torch.randn(2, 3, 8)
    with pytest.raises(NothingToConvertError, match="the carrier is quantised"):
        attnres_compile.convert(QuantisedCarrier(), (x,))
