"""Quantised base weights are left alone; a quantised stream is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attnres_compile
from attnres_compile import AttnResConfig
from attnres_compile.errors import NothingToConvertError
from conversions import LLAMA, NUM_BLOCKS, error, llama_inputs, randomize, sites_of
from oracle_cases import run_oracle
from oracle_mixer import Mixing
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


class Int8Product(torch.autograd.Function):
    """A product with gradients for the activations alone, as of a kernel of the library's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return x @ (weight.to(x.dtype) * scale).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return grads[0] @ (weight.to(grads[0].dtype) * scale), None, None


class Int8FunctionLinear(Int8Linear):
    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = Int8Product.apply(x, self.get_buffer("weight"), self.get_buffer("scale"))
        return product


def with_linears(model: nn.Module, kind: type[Int8Linear]) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(module, name, kind(child))
    return model


def with_int8_linears(model: nn.Module) -> nn.Module:
    return with_linears(model, Int8Linear)


def with_int8_functions(model: nn.Module) -> nn.Module:
    return with_linears(model, Int8FunctionLinear)


def with_torchao(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


QUANTISATIONS = [with_int8_linears, with_int8_functions, with_torchao]


@pytest.mark.parametrize("quantize", QUANTISATIONS)
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


@pytest.mark.parametrize("quantize", QUANTISATIONS)
def test_quantised_weights_equal_the_oracle(quantize: Any) -> None:
    plain = quantize(LLAMA.build(torch.float32))
    config = AttnResConfig(num_blocks=NUM_BLOCKS)
    converted: Any = attnres_compile.convert(plain, (), llama_inputs(), config=config)
    randomize(converted)
    mixing = Mixing(sites_of(converted), num_blocks=NUM_BLOCKS)
    expected = run_oracle(LLAMA, plain, mixing, torch.float32).outputs["logits"]

    logits = converted(**llama_inputs()).logits
    assert error(logits, expected) < 1e-5
    logits.square().sum().backward()
    assert all(p.grad is not None for p in converted.model.attnres.parameters())


class QuantisedCarrier(nn.Module):
    """Rounds the stream itself to eight bits after every addition."""

    def __init__(self, quantise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        self.quantise = quantise

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(F.layer_norm(x, (8,)))
            x = self.quantise(x)
        return x


def by_fake_quantisation(x: Tensor) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, 0.05, 0, -128, 127)


def through_int8(x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x, 0.05, 0, torch.qint8).dequantize()


@pytest.mark.parametrize("quantise", [by_fake_quantisation, through_int8])
@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_a_quantised_stream_is_refused(quantise: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 3, 8)
    sentence = "4 x the carrier is quantised between residual additions; keep the stream in float"
    with pytest.raises(NothingToConvertError, match=sentence):
        attnres_compile.convert(QuantisedCarrier(quantise), (x,))
