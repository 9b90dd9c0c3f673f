"""The verdict on a conversion: right ones pass, wrong ones fail, and notes say what to expect."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnres_compile
from attnres_compile import AttnResConfig, VerifyReport
from attnres_compile.errors import InputError
from attnres_compile.verification import tolerance
from conversions import LLAMA, randomize
from handwritten_models import GPTBlock, NanoGPT, PreActivationResNet, TokenModel

IDX = torch.arange(10).reshape(2, 5)


def test_a_right_conversion_passes() -> None:
    model = NanoGPT(width=16, heads=2, layers=2).eval()
    converted = attnres_compile.convert(copy.deepcopy(model), (IDX, IDX))

    report = attnres_compile.verify(model, converted, (IDX, IDX))

    assert report.passed
    assert report.notes == ()
    assert report.num_sites == 4
    names = [name for name, _ in model.named_parameters()]
    for dtype, allowed in (("float32", 1e-5), ("float64", 1e-10)):
        own = [each for each in report.comparisons if each.dtype == dtype]
        assert [c.name for c in own if c.kind == "output"] == ["0", "1"]
        assert [c.name for c in own if c.kind == "gradient"] == names
        assert {c.tolerance for c in own} == {allowed}


def test_a_model_with_trained_queries_fails_with_a_note() -> None:
    model, converted = small()
    randomize(converted)

    report = attnres_compile.verify(model, converted, (IDX,))

    assert not report.passed
    assert report.notes == ("queries are trained (4 are not zero); equality is not expected.",)
    assert failed(report, "output") == {("float32", "output"), ("float64", "output")}
    assert len(failed(report, "gradient")) > 20


def test_a_changed_base_weight_fails_with_a_note() -> None:
    model, converted = small()
    with torch.no_grad():
        converted.get_parameter("blocks.1.mlp.0.weight").mul_(1.01)

    report = attnres_compile.verify(model, converted, (IDX,))

    assert not report.passed
    assert report.notes == (
        "1 base weights are not the original's (first: blocks.1.mlp.0.weight).",
    )


def test_an_error_that_float32_hides_fails_in_float64() -> None:
    model, converted = small()
    with torch.no_grad():
        converted.get_parameter("norm.bias").add_(1e-7)

    report = attnres_compile.verify(model, converted, (IDX,))

    assert not report.passed
    assert all(each.passed for each in report.comparisons if each.dtype == "float32")


def test_float64_can_be_left_out() -> None:
    model, converted = small()

    report = attnres_compile.verify(model, converted, (IDX,), float64=False)

    assert report.passed
    assert {each.dtype for each in report.comparisons} == {"float32"}


def test_nothing_is_changed_in_train_mode() -> None:
    model = PreActivationResNet(widths=(8,), blocks=2).train()
    converted = attnres_compile.convert(copy.deepcopy(model), (torch.randn(2, 3, 8, 8),))
    both = nn.ModuleList([model, converted])
    inputs = (torch.randn(2, 3, 8, 8),)
    before, state = copy.deepcopy(both.state_dict()), torch.get_rng_state()

    report = attnres_compile.verify(model, converted, inputs, float64=False)

    assert report.passed
    assert all(torch.equal(value, before[name]) for name, value in both.state_dict().items())
    assert all(parameter.grad is None for parameter in both.parameters())
    assert model.training
    assert converted.training
    assert torch.equal(state, torch.get_rng_state())


def test_dropout_agrees_in_train_mode() -> None:
    model = NanoGPT(width=16, heads=2, layers=2).train()
    converted = attnres_compile.convert(copy.deepcopy(model), (IDX, IDX))

    assert attnres_compile.verify(model, converted, (IDX, IDX)).passed


@pytest.mark.slow
def test_compiled_dropout_is_noted() -> None:
    model = NanoGPT(width=16, heads=2, layers=2)
    converted = attnres_compile.convert(copy.deepcopy(model), (IDX, IDX), executor="attnres")

    report = attnres_compile.verify(model, converted, (IDX, IDX), float64=False)

    assert report.notes == (
        "compiled dropout draws other masks than eager dropout; verify in eval mode.",
    )


def test_the_mean_form_is_noted() -> None:
    model = TokenModel(GPTBlock(16, 2), width=16).eval()
    converted = attnres_compile.convert(
        copy.deepcopy(model), (IDX,), config=AttnResConfig(aggregate="mean")
    )

    (note,) = attnres_compile.verify(model, converted, (IDX,), float64=False).notes

    assert 'with aggregate="mean" only scale-invariant readers see the same function' in note


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_judged_by_its_own_eps(dtype: torch.dtype) -> None:
    model, converted = small(dtype)

    report = attnres_compile.verify(model, converted, (IDX,))

    assert report.passed
    assert report.comparisons[0].tolerance == 8 * torch.finfo(dtype).eps * 2


def test_what_rounding_does_to_the_original_is_allowed_in_16_bits() -> None:
    model = TokenModel(*(ChaoticBlock() for _ in range(6)), width=16).bfloat16().eval()
    converted = attnres_compile.convert(
        copy.deepcopy(model), (IDX,), config=AttnResConfig(num_blocks=2)
    )

    report = attnres_compile.verify(model, converted, (IDX,))
    without_float64 = attnres_compile.verify(model, converted, (IDX,), float64=False)

    assert report.passed
    assert not without_float64.passed
    assert max(c.tolerance for c in report.comparisons) > tolerance(torch.bfloat16, 6)


def test_autocast_is_judged_by_its_dtype() -> None:
    model, converted = small()

    with torch.autocast("cpu", torch.bfloat16):
        report = attnres_compile.verify(model, converted, (IDX,))

    assert report.passed
    assert {each.dtype for each in report.comparisons} == {"bfloat16", "float64"}


def test_a_carrier_that_stays_in_float32_is_noticed() -> None:
    model = RoundedCarrier().eval()
    x = torch.randn(2, 5, 16)
    converted = attnres_compile.convert(
        copy.deepcopy(model), (x,), config=AttnResConfig(num_blocks=2)
    )

    report = attnres_compile.verify(model, converted, (x,))

    assert report.passed
    assert report.notes == (
        "the model rounds its residual stream to torch.float32 in float64 too, where 1.0e-06 is "
        "therefore allowed.",
    )


def test_a_model_that_cannot_run_in_float64_is_compared_in_its_own_dtype() -> None:
    model = OnlyFloat32().eval()
    x = torch.randn(2, 5, 16)
    converted = attnres_compile.convert(copy.deepcopy(model), (x,))

    report = attnres_compile.verify(model, converted, (x,))

    assert report.passed
    assert {each.dtype for each in report.comparisons} == {"float32"}
    (note,) = report.notes
    assert note.startswith("not compared in float64, where the original does not run (RuntimeError")


def test_caches_are_compared_and_inputs_inferred() -> None:
    model = LLAMA.build(torch.float32)
    converted = attnres_compile.convert(copy.deepcopy(model))

    report = attnres_compile.verify(
        model, converted, (), {"input_ids": IDX, "use_cache": True}, float64=False
    )
    without_inputs = attnres_compile.verify(model, converted, float64=False)

    outputs = [each.name for each in report.comparisons if each.kind == "output"]
    assert report.passed
    assert "past_key_values.layers.1.values" in outputs
    assert [c.name for c in without_inputs.comparisons if c.kind == "output"] == ["logits"]
    assert f"past_key_values.layers.*.keys x {len(model.model.layers)}" in str(report)


def test_the_report_is_a_table() -> None:
    model, converted = small()

    lines = str(attnres_compile.verify(model, converted, (IDX,))).splitlines()

    assert lines[0] == "TokenModel, original against converted: passed"
    assert lines[1].split() == ["dtype", "compared", "abs", "error", "rel", "error", "allowed"]
    assert lines[2].split()[:2] == ["float32", "output"]
    assert lines[2].split()[-2:] == ["1.0e-05", "ok"]
    assert "sqrt(4 sites)" in lines[-2]


def test_the_report_names_what_failed() -> None:
    model, converted = small()
    randomize(converted)

    text = str(attnres_compile.verify(model, converted, (IDX,)))

    assert text.startswith("TokenModel, original against converted: FAILED")
    assert "gradient of blocks.*.norm_1.weight x 2" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 100


def test_to_json_is_plain_json() -> None:
    model, converted = small()
    with torch.no_grad():
        converted.get_parameter("norm.bias").fill_(float("nan"))

    data = attnres_compile.verify(model, converted, (IDX,), float64=False).to_json()

    first = json.loads(json.dumps(data, allow_nan=False))["comparisons"][0]
    assert data["passed"] is False
    assert first == {
        "dtype": "float32",
        "kind": "output",
        "name": "output",
        "absolute": None,
        "relative": None,
        "tolerance": 1e-5,
        "passed": False,
    }


@pytest.mark.parametrize(
    ("dtype", "num_sites", "expected"),
    [
        (torch.float64, 252, 1e-10),
        (torch.float32, 8, 1e-5),
        (torch.float32, 252, 8 * 2**-23 * 252**0.5),
        (torch.bfloat16, 4, 2**-3),
        (torch.float16, 4, 2**-6),
    ],
)
def test_tolerances_grow_with_eps_and_depth(
    dtype: torch.dtype, num_sites: int, expected: float
) -> None:
    assert tolerance(dtype, num_sites) == pytest.approx(expected)


def test_an_unconverted_model_is_refused() -> None:
    model = TokenModel(GPTBlock(16, 2), width=16)

    with pytest.raises(InputError, match="the second TokenModel has no Attention Residuals; call"):
        attnres_compile.verify(model, model, (IDX,))


def test_another_model_is_refused() -> None:
    _, converted = small()

    with pytest.raises(
        InputError,
        match=r"no conversion of this TokenModel: it has no parameter blocks\.2\.norm_1\.weight\.",
    ):
        attnres_compile.verify(TokenModel(*(GPTBlock(16, 2) for _ in range(3))), converted, (IDX,))


def test_weights_on_the_meta_device_are_refused() -> None:
    model, converted = small()

    with pytest.raises(InputError, match="weights of this TokenModel lie on the meta device"):
        attnres_compile.verify(model.to("meta"), converted.to("meta"), (IDX,))


class RoundedCarrier(nn.Module):
    """A residual stream in float32 whatever the weights, like Mamba's ``residual_in_fp32``."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(5))
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.layers[0].weight.dtype
        x = (x * 1).to(torch.float32)
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = x + layer(norm(x.to(dtype))).to(torch.float32)
        return self.norms[-1](x.to(dtype))


class OnlyFloat32(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(3))
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = x + F.linear(norm(x), layer.weight.float())
        return self.norms[-1](x)


class ChaoticBlock(nn.Module):
    """A branch that makes anything of a rounding error."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(50 * self.norm(x)).sin()


def small(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """Two layers of two sublayers each, and an independent conversion."""
    model = TokenModel(GPTBlock(16, 2), GPTBlock(16, 2), width=16).to(dtype).eval()
    return model, attnres_compile.convert(copy.deepcopy(model), (IDX,))


def failed(report: VerifyReport, kind: str) -> set[tuple[Any, ...]]:
    return {(c.dtype, c.name) for c in report.comparisons if c.kind == kind and not c.passed}
