"""The sweep over model libraries: its builder, what it calls a failure, and its tables.

The whole sweep is ``python benchmarks/coverage/sweep.py``; its results are in docs/coverage.md.
"""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import CLIPConfig, LlamaConfig, PreTrainedConfig, SwinConfig

import check_model
import sweep
import tiny_configs
import tiny_inputs
import tiny_transformers
import tiny_vision
from attnres_compile.comparing import compare, run
from report import report


def test_architectures_are_read_from_the_library() -> None:
    found = tiny_transformers.architectures()
    assert len(found) > 1000
    assert found["LlamaForCausalLM"] == "transformers.models.llama.modeling_llama"
    assert tiny_transformers.family_of("T5Model") == "t5"
    assert "LlamaPreTrainedModel" not in found
    assert "LlamaConfig" not in found
    assert hasattr(transformers, "LlamaForCausalLM")


def test_the_main_class_of_each_family() -> None:
    main = tiny_transformers.main_architectures()
    families = [tiny_transformers.family_of(name) for name in main]
    assert len(families) == len(set(families)) > 400
    assert {"LlamaModel", "BertModel", "T5Model", "ViTModel"} <= set(main)
    assert not {"AutoModel", "LlamaForCausalLM"} & set(main)


def test_a_tiny_config() -> None:
    config = tiny_configs.tiny_config(LlamaConfig, tiny_configs.recipe("tiny"))
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (32, 64, 2)
    assert (config.num_attention_heads, config.vocab_size) == (4, 96)
    assert config.rms_norm_eps == LlamaConfig().rms_norm_eps
    config = tiny_configs.tiny_config(LlamaConfig, tiny_configs.recipe("shallow"))
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (4096, 2, 96)


def test_a_tiny_config_of_parts_and_lists() -> None:
    small = tiny_configs.recipe("tiny")
    config = tiny_configs.tiny_config(CLIPConfig, small)
    assert (config.text_config.hidden_size, config.vision_config.image_size) == (32, 32)
    # a pad token beyond a vocabulary of 96 would be outside of the embedding
    assert max(config.text_config.bos_token_id, config.text_config.eos_token_id) < 96
    assert list(SwinConfig().num_heads) == [3, 6, 12, 24]
    config = tiny_configs.tiny_config(SwinConfig, small)
    assert list(config.num_heads) == [1, 1, 2, 4]  # of at most 4, in proportion
    assert (config.depths, config.embed_dim) == (SwinConfig().depths, 32)


class LayersConfig(PreTrainedConfig):
    """A value per layer, and one that is not given."""

    model_type = "layers"

    def __init__(self, **options: Any) -> None:
        self.num_hidden_layers = options.pop("num_hidden_layers", 4)
        self.kinds = options.pop("kinds", ["slow", "slow", "slow", "fast"])
        self.head_dim = options.pop("head_dim", None)
        self.pair = options.pop("pair", [1, 2])
        super().__init__(**options)


def test_what_is_not_given_is_filled_only_by_recipes_that_say_so() -> None:
    config = tiny_configs.tiny_config(LayersConfig, tiny_configs.recipe("tiny"))
    assert (config.num_hidden_layers, len(config.kinds), config.head_dim) == (2, 4, None)
    filled = tiny_configs.recipe("tiny, what is not given too")
    config = tiny_configs.tiny_config(LayersConfig, filled)
    # one layer of each kind, in their order; a list of another length is no list of layers
    assert (config.kinds, config.head_dim, config.pair) == (["slow", "fast"], 8, [1, 2])


def test_exceptions_go_before_every_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    exceptions = {"LayersConfig": {"head_dim": 5, "kinds": ["slow"]}}
    monkeypatch.setattr(tiny_configs, "FIELDS", exceptions)
    for how in tiny_configs.RECIPES:
        config = tiny_configs.tiny_config(LayersConfig, how)
        assert (config.head_dim, config.kinds) == (5, ["slow"]), how.name


class Inputs(nn.Module):
    """Accepts tokens of one shape only."""

    main_input_name = "input_ids"

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.config = LlamaConfig(vocab_size=96, num_codebooks=3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if input_ids.shape[2:] != self.shape:
            raise ValueError(f"{tuple(input_ids.shape)}")
        return input_ids


@pytest.mark.parametrize("shape", [(), (3,), (4,)])
def test_the_fewest_inputs_of_a_shape_that_is_accepted(shape: tuple[int, ...]) -> None:
    """Plain tokens, those of the codebooks, and these with text beside them."""
    inputs = tiny_inputs.inputs_of(Inputs(shape))
    assert {name: value.shape[2:] for name, value in inputs.items()} == {"input_ids": shape}


def test_inputs_that_are_not_accepted() -> None:
    with pytest.raises(ValueError, match=r"\(2, 8\)"):
        tiny_inputs.inputs_of(Inputs((7,)))


@pytest.mark.parametrize(
    "name",
    [
        "RagModel",
        "Sam3TrackerModel",
        "SamHQModel",
        "TimesFm2_5Model",
        "UdopModel",
        "VibeVoiceAcousticTokenizerModel",
        "VitMatteForImageMatting",
        "VoxtralRealtimeModel",
        "Wav2Vec2BertModel",
        "XmodModel",
        "Zamba2Model",
        "ZambaModel",
    ],
)
def test_what_asks_for_fields_or_inputs_of_its_own_is_tiny_too(name: str) -> None:
    model, _, recipe = tiny_transformers.build(name)
    assert recipe == "tiny"
    assert sum(parameter.numel() for parameter in model.parameters()) < 3_000_000


def test_another_class_stands_for_a_family_that_is_not_called_as_a_whole() -> None:
    model, inputs, recipe = tiny_transformers.build("BarkModel")
    assert type(model).__name__ == "BarkCausalModel"
    assert recipe == "tiny; BarkCausalModel stands for the family"
    assert "input_ids" in inputs


def test_what_cannot_be_built_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only for the main class of a family another one stands."""
    monkeypatch.setattr(tiny_transformers, "main_architectures", lambda: ())
    with pytest.raises(ValueError, match="it has no forward"):
        tiny_transformers.build("BarkModel")
    result = check_model.check("transformers", "BarkModel")
    assert (result.status, "capture" in result.seconds) == ("not built", False)


class Chain(nn.Module):
    """Two sublayers; `breaks` makes it untraceable, `plain` leaves out its residual additions."""

    def __init__(self, *, breaks: bool = False, plain: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.breaks, self.plain = breaks, plain

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if self.plain else x + layer(x)
        if self.breaks:
            torch._dynamo.graph_break()
        return x.tanh()


def checked(monkeypatch: pytest.MonkeyPatch, **options: bool) -> check_model.Result:
    def builder(library: str, name: str) -> Any:
        return "chains", lambda: (Chain(**options).eval(), {"x": torch.randn(3, 4)}, "by hand")

    monkeypatch.setattr(check_model, "builder", builder)
    return check_model.check("tests", "Chain")


def test_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    result = checked(monkeypatch)
    assert (result.status, result.detail) == ("converted", "by hand")
    assert (result.streams, result.additions, result.sites) == (1, 2, 3)
    steps = ["build", "capture", "plan", "refusals", "convert", "verify", "strip", "step"]
    assert list(result.seconds) == steps
    assert json.loads(json.dumps(result.to_json()))["family"] == "chains"


def test_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    result = checked(monkeypatch, plain=True)
    assert (result.status, result.detail) == ("refused", "no residual addition found")
    assert "convert" not in result.seconds


def test_capture_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    result = checked(monkeypatch, breaks=True)
    assert result.status == "capture failed"
    assert "could not be captured as one graph" in result.detail


def wrongly(change: Any) -> Any:
    convert = check_model.attnres_compile.convert

    def converting(*args: Any, **kwargs: Any) -> Any:
        converted = convert(*args, **kwargs)
        with torch.no_grad():
            change(converted)
        return converted

    return converting


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (lambda m: m.layers[1].bias.add_(1e-3), "verify: AssertionError: "),
        (lambda m: m.attnres.before_tanh.query.add_(0.1), "verify: AssertionError: "),
        (
            lambda m: m.attnres.before_tanh.query.requires_grad_(False),
            "step: AssertionError: no finite gradient of attnres.before_tanh.query",
        ),
        (
            lambda m: m.register_buffer("extra", torch.zeros(1)),
            "strip: AssertionError: other names, ['extra']",
        ),
    ],
)
def test_wrong(monkeypatch: pytest.MonkeyPatch, change: Any, detail: str) -> None:
    monkeypatch.setattr(check_model.attnres_compile, "convert", wrongly(change))
    result = checked(monkeypatch)
    assert result.status == "wrong"
    assert result.detail.startswith(detail)


def test_stripped_weights_are_compared_bit_for_bit() -> None:
    before = Chain().state_dict()
    check_model._check_same(copy.deepcopy(before), before)
    other = copy.deepcopy(before)
    other["layers.0.bias"].view(-1)[0] += 1e-7
    with pytest.raises(AssertionError, match=r"layers\.0\.bias differs"):
        check_model._check_same(other, before)


class Amplifying(Chain):
    """One unit in the last place of float64 is 1e-8 of its output, or of float32 1e-5."""

    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x) * (1e8 if x.dtype == torch.float64 else 100)).sin()


@pytest.mark.parametrize(
    ("dtype", "off", "excused"),
    [
        (torch.float64, 2e-16, True),
        (torch.float64, 1e-12, False),
        (torch.float32, 1e-7, True),
        (torch.float32, 1e-5, False),
    ],
)
def test_roundings_that_a_model_amplifies(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, off: float, excused: bool
) -> None:
    """No tolerance holds for it; what is wrong by more is told from roundings all the same."""

    def verify(model: nn.Module, other: nn.Module, args: Any, kwargs: Any) -> Any:
        runs = [run(copy.deepcopy(each), args, kwargs) for each in (model, other)]
        return SimpleNamespace(comparisons=compare(*runs, dtype, 1e-10))

    monkeypatch.setattr(check_model.attnres_compile, "verify", verify)
    torch.manual_seed(0)
    model, x = Amplifying().to(dtype), torch.randn(30, 4, dtype=dtype)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= 1 + off
    (output, *_) = verify(model, other, (), {"x": x}).comparisons
    assert 1e-10 < output.relative < 1e-2
    outcome = contextlib.nullcontext() if excused else pytest.raises(AssertionError, match="differ")
    with outcome:
        check_model._check_in_float64(model, other, {"x": x})


def line(model: str, status: str, **other: Any) -> dict[str, Any]:
    result = check_model.Result(model, "transformers", model.lower(), status, **other)
    return result.to_json()


def test_results_are_resumed(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert sweep.read_results(path) == []
    lines = [line("A", "wrong"), line("B", "converted"), line("A", "converted")]
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    found = sweep.read_results(path)
    assert [(each["model"], each["status"]) for each in found] == [
        ("A", "converted"),
        ("B", "converted"),
    ]


def test_the_tables() -> None:
    seconds = {"capture": 2.0, "plan": 0.5}
    page = report(
        [
            line("A", "converted", additions=6, seconds=seconds),
            line("B", "refused", refusals={"post-norm": 4}, reasons={"post-norm": "the norm (x)"}),
            line("C", "capture failed", detail="a graph | break"),
            line("D", "converted", additions=2),
            line("E", "converted", additions=3, delta_sources=True),
        ],
        "the command",
    )
    assert "| transformers | 3 | 1 | 1 | 0 | 0 | 0 | 0 | 75% | 75% | 1 |" in page
    assert "Converted, with the number of residual additions: A (6), D (2)." in page
    assert "Converted by delta_sources, with the number of residual additions: E (3)." in page
    assert "| b | B | refused | 4 x post-norm |" in page
    assert "| c | C | capture failed | a graph \\| break |" in page
    assert "| post-norm | 1 | B: the norm (x) |" in page
    assert "| A | 2.00 | 0.50 | 0.25 |" in page


def test_timm_and_torchvision() -> None:
    assert {"convnext", "vision_transformer", "resnet"} <= set(tiny_vision.timm_models())
    kinds = tiny_vision.torchvision_models()
    assert kinds["resnet18"] == "classification"
    assert kinds["fcn_resnet50"] == "segmentation"
    assert kinds["r3d_18"] == "video"
    assert "ssd300_vgg16" in kinds
    model, kwargs, recipe = tiny_vision.build_timm("convnext")
    assert (list(kwargs), kwargs["x"].shape) == (["x"], (2, 3, 64, 64))
    assert recipe == "convnext_atto, 64 pixels, two blocks of each kind"
    assert [len(stage.blocks) for stage in model.stages] == [2, 2, 2, 2]
    assert not model.training


def test_the_model_of_timm_with_the_least_nested_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    depths = {"a": None, "b": 3, "c": 2, "d": 2, "e": 3}
    monkeypatch.setattr(tiny_vision, "_depth_of_repeats", depths.__getitem__)
    assert tiny_vision._with_repeats_first(list("abcde")) == ["c", "a", "b"]
    assert tiny_vision._with_repeats_first(list("aeb")) == ["e", "a", "b"]
    assert tiny_vision._with_repeats_first(list("a")) == ["a"]
    depths["b"] = 1  # the others need not be looked at then
    assert tiny_vision._with_repeats_first(list("abz")) == ["b", "a", "z"]


@pytest.mark.slow
def test_workers_and_their_time_limit() -> None:
    todo = [("transformers", "BertModel"), ("torchvision", "alexnet")]
    found = {each["model"]: each["status"] for each in sweep.sweep(todo, jobs=2, limit=300)}
    assert found == {"BertModel": "refused", "alexnet": "refused"}
    (late,) = sweep.sweep(todo[:1], jobs=1, limit=0.1)
    assert (late["status"], late["detail"]) == ("out of time", "more than 0 seconds")


def test_what_delta_sources_may_convert() -> None:
    refused = line("A", "refused", refusals={"post-norm": 4})
    assert sweep._may_have_deltas(refused)
    assert not sweep._may_have_deltas(refused | {"delta_sources": True})
    assert not sweep._may_have_deltas(line("A", "refused"))  # no residual addition found
    assert not sweep._may_have_deltas(line("A", "converted", refusals={"post-norm": 4}))
    assert not sweep._may_have_deltas(None)
