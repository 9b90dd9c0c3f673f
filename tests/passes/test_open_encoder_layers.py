"""The fused encoder layer of PyTorch, written out, is the layer as it runs without the fusion."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, fx, nn

from attnres_compile import AttnResConfig, convert
from attnres_compile.errors import NothingToConvertError
from attnres_compile.passes.open_encoder_layers import open_encoder_layers
from tolerances import assert_matches, relative_error

WIDTH, TOKENS = 12, 5


class CapturedError(Exception):
    pass


def fused_graph(model: nn.Module, x: Tensor, **masks: Tensor) -> tuple[fx.GraphModule, list[Any]]:
    """The graph of a model whose layers are fused, and what it is called with."""
    found: list[Any] = []

    def backend(module: fx.GraphModule, inputs: list[Any]) -> NoReturn:
        found.extend((module, inputs))
        raise CapturedError

    with torch.no_grad(), pytest.raises(Exception, match="CapturedError"):
        torch.compile(model, backend=backend, fullgraph=True)(x, **masks)
    return found[0], found[1]


def fused_calls(module: fx.GraphModule) -> int:
    target = torch._transformer_encoder_layer_fwd
    return len(module.graph.find_nodes(op="call_function", target=target))


def unfused(model: nn.Module, x: Tensor, **masks: Tensor) -> Tensor:
    assert torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            result: Tensor = model(x, **masks)
            return result
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


MASKS: dict[str, dict[str, Tensor]] = {
    "no mask": {},
    "causal": {"src_mask": nn.Transformer.generate_square_subsequent_mask(TOKENS).double()},
    "distances": {"src_mask": -torch.rand(TOKENS, TOKENS, dtype=torch.float64)},
    "one per head": {"src_mask": torch.randn(3 * 4, TOKENS, TOKENS, dtype=torch.float64)},
    "padding": {"src_key_padding_mask": (torch.arange(TOKENS) > 2).repeat(3, 1)},
    "both": {
        "src_mask": torch.randn(TOKENS, TOKENS, dtype=torch.float64),
        "src_key_padding_mask": torch.randn(3, TOKENS, dtype=torch.float64),
    },
}


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 20, batch_first=True, **options)
    for parameter in layer.parameters():  # biases and norms that count
        nn.init.normal_(parameter, std=0.5)
    return layer.eval().double()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("norm_first", [True, False])
def test_what_it_computes(mask: str, norm_first: bool) -> None:
    options = {"activation": "gelu", "layer_norm_eps": 0.1} if norm_first else {}
    layer = encoder_layer(norm_first=norm_first, **options)
    x = torch.randn(3, TOKENS, WIDTH, dtype=torch.float64)
    module, inputs = fused_graph(layer, x, **MASKS[mask])
    assert fused_calls(module) == 1
    assert open_encoder_layers(module) == 1
    assert fused_calls(module) == 0
    (actual,) = module(*inputs)
    assert_matches(actual, unfused(layer, x, **MASKS[mask]), name=mask)


def test_a_graph_without_the_layer_is_left_alone() -> None:
    module = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    before = module.code
    assert open_encoder_layers(module) == 0
    assert module.code == before


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_converted_encoder_compiles_for_inference(norm_first: bool) -> None:
    """There the layers are fused where the user's torch.compile traces, and nowhere else."""
    layer = encoder_layer(norm_first=norm_first).float()
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    x = torch.randn(2, TOKENS, WIDTH)
    assert fused_calls(fused_graph(copy.deepcopy(encoder), x)[0]) == 3
    config = AttnResConfig(num_blocks=2, delta_sources=not norm_first)
    converted = convert(encoder, (x,), config=config)
    compiled = torch.compile(converted, backend="attnres", fullgraph=True)
    with torch.no_grad():
        assert_matches(compiled(x), unfused(encoder, x), name="lossless")
        for name, parameter in converted.named_parameters():
            if name.endswith(".query"):
                nn.init.normal_(parameter)
        assert_matches(compiled(x), converted(x), name="trained")
        assert not torch.allclose(compiled(x), unfused(encoder, x))


class Autocast(nn.Module):
    """An encoder under an autocast of its own."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            result: Tensor = self.encoder(x)
            return result


def close(actual: Tensor, expected: Tensor) -> bool:
    """As close as two orders of roundings to bfloat16 are."""
    return actual.dtype == expected.dtype and relative_error(actual, expected) < 0.02


def test_a_model_that_switches_autocast_on_is_refused() -> None:
    """On a CPU the layer is fused under autocast too, and Dynamo does not know its dtypes there."""
    layer = encoder_layer(norm_first=True).float()
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    x = torch.randn(2, TOKENS, WIDTH)
    converted = convert(Autocast(encoder), (x,), config=AttnResConfig(num_blocks=2))
    compiled = torch.compile(converted, backend="attnres", fullgraph=True)
    with torch.no_grad():
        with pytest.raises(Exception, match=r"fused operator.*set_fastpath_enabled\(False\)"):
            compiled(x)
        assert close(unfused(compiled, x), converted(x))


def test_under_autocast_around_the_call() -> None:
    layer = encoder_layer(norm_first=True).float()
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    x = torch.randn(2, TOKENS, WIDTH)
    converted = convert(encoder, (x,), config=AttnResConfig(num_blocks=2))
    compiled = torch.compile(converted, backend="attnres", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert close(compiled(x), converted(x))


def test_fused_layers_of_an_export_are_named() -> None:
    layer = encoder_layer(norm_first=True)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        program = torch.export.export(encoder, (x,), strict=True)
    with pytest.raises(NothingToConvertError, match=r"3 x PyTorch has fused a layer"):
        convert(program)
    program = torch.export.export(encoder, (x,), strict=True)
    assert convert(program).plan.num_residual_additions == 6  # type: ignore[attr-defined]
