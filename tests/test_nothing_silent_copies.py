"""Copies, pickles, replaced and added weights, and what is saved, of converted language models.

The model is a Llama whose Block AttnRes forward pass is written by hand in ``oracles.py``. Random
queries keep the unconverted network's output far away.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import attnres_compile
from conversions import (
    LLAMA,
    converted_llama,
    error,
    llama_inputs,
    llama_oracle_logits,
    randomize,
)
from zoo import by_name

EXACT = 1e-6


@pytest.fixture(scope="module")
def shared() -> Any:
    """One conversion for all tests, which take copies."""
    return converted_llama()


@pytest.fixture
def converted(shared: Any) -> Any:
    return copy.deepcopy(shared)


def logits(model: Any) -> Tensor:
    output: Tensor = model(**llama_inputs()).logits
    return output.detach()


def assert_exact(model: Any, dtype: torch.dtype = torch.float32) -> None:
    actual = model(**llama_inputs(dtype)).logits.detach()
    assert error(actual, llama_oracle_logits(model, dtype)) < EXACT


def scaled(model: Any, factor: float = 1.2) -> dict[str, Tensor]:
    return {name: value.clone() * factor for name, value in model.state_dict().items()}


class TestCopies:
    @pytest.mark.parametrize("called_before", [True, False])
    def test_a_copy_runs_its_own_weights(self, converted: Any, called_before: bool) -> None:
        before = logits(converted) if called_before else None
        duplicate = copy.deepcopy(converted)
        duplicate.load_state_dict(scaled(duplicate))
        assert_exact(duplicate)
        assert_exact(converted)
        assert before is None or error(logits(duplicate), before) > 0.1

    def test_a_pickle_taken_after_a_call(self, converted: Any) -> None:
        assert_exact(converted)
        restored = pickle.loads(pickle.dumps(converted))
        assert type(restored) is type(converted)
        assert restored.plan == converted.plan
        restored.load_state_dict(scaled(restored))
        assert_exact(restored)
        assert_exact(converted)

    def test_torch_save(self, converted: Any) -> None:
        file = io.BytesIO()
        torch.save(converted, file)
        file.seek(0)
        assert_exact(torch.load(file, weights_only=False))

    def test_the_original_is_as_it_was(self) -> None:
        """Neither hooks nor attributes are left on it; it still pickles and records once."""
        plain = LLAMA.build(torch.float32)
        before = {path: sorted(vars(module)) for path, module in plain.named_modules()}
        expected = logits(plain)
        converted = attnres_compile.convert(plain, (), llama_inputs())
        randomize(converted)
        records = converted(**llama_inputs(), output_hidden_states=True).hidden_states
        assert {path: sorted(vars(module)) for path, module in plain.named_modules()} == before
        assert not any(module._forward_hooks for module in plain.modules())
        assert error(logits(pickle.loads(pickle.dumps(plain))), expected) == 0
        assert error(logits(plain), expected) == 0

        own_records = plain(**llama_inputs(), output_hidden_states=True).hidden_states
        again = converted(**llama_inputs(), output_hidden_states=True).hidden_states
        assert len(records) == len(own_records) == len(again) == 3
        assert error(again[1], records[1]) == 0
        assert error(own_records[1], records[1]) > 0.01


class TestWeights:
    def test_assigned(self, converted: Any) -> None:
        assert_exact(converted)
        converted.load_state_dict(scaled(converted), assign=True)
        assert_exact(converted)

    def test_replaced_one_by_one(self, converted: Any) -> None:
        assert_exact(converted)
        site = next(iter(converted.model.attnres.children()))
        site.query = torch.nn.Parameter(-2 * site.query.detach())
        converted.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 32, bias=False)
        assert_exact(converted)

    def test_functional_call(self, converted: Any) -> None:
        before = logits(converted)
        weights = scaled(converted)
        called = torch.func.functional_call(converted, weights, (), llama_inputs()).logits
        changed = copy.deepcopy(converted)
        changed.load_state_dict(weights)
        assert error(called, llama_oracle_logits(changed)) < EXACT
        assert error(logits(converted), before) == 0

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_another_dtype(self, converted: Any, dtype: torch.dtype) -> None:
        assert_exact(converted)
        assert_exact(converted.to(dtype), dtype)

    @pytest.mark.filterwarnings("ignore::FutureWarning")
    def test_adapters(self, converted: Any) -> None:
        from peft import LoraConfig, get_peft_model

        before = logits(converted)
        config = LoraConfig(target_modules=["q_proj", "down_proj"], r=2, init_lora_weights=False)
        adapted = get_peft_model(converted, config)
        with_adapters = logits(adapted)
        merged = adapted.merge_and_unload()
        assert error(with_adapters, before) > 0.1
        assert error(with_adapters, llama_oracle_logits(merged)) < 1e-5
        assert_exact(merged)

    @pytest.mark.filterwarnings("ignore::FutureWarning")
    def test_injected_adapters(self, converted: Any) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        before = logits(converted)
        config = LoraConfig(target_modules=["v_proj", "up_proj"], r=2, init_lora_weights=False)
        inject_adapter_in_model(config, converted)
        with_adapters = logits(converted)
        for module in converted.modules():
            if hasattr(module, "lora_B"):
                module.lora_B["default"].weight.data.zero_()
        assert error(with_adapters, before) > 0.01
        assert error(logits(converted), before) < EXACT


class TestSaving:
    MODEL_TYPE = "has model type `attnres_compile` but Transformers does not recognize"
    DTYPE = "this checkpoint has Attention Residuals: load it with attnres_compile"

    @pytest.mark.parametrize(
        ("loader", "sentence"),
        [
            ("AutoConfig", MODEL_TYPE),
            ("AutoModel", MODEL_TYPE),
            ("AutoModelForCausalLM", MODEL_TYPE),
            ("LlamaConfig", DTYPE),
            ("LlamaModel", DTYPE),
            ("LlamaForCausalLM", DTYPE),
        ],
    )
    def test_no_stock_class_loads_it(
        self, converted: Any, tmp_path: Path, loader: str, sentence: str
    ) -> None:
        converted.save_pretrained(tmp_path)
        with pytest.raises((ValueError, AttributeError), match=sentence):
            getattr(transformers, loader).from_pretrained(tmp_path)

    def test_a_dtype_of_the_callers_changes_nothing(self, converted: Any, tmp_path: Path) -> None:
        converted.save_pretrained(tmp_path)
        with pytest.raises(AttributeError, match=self.DTYPE):
            transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)

    def test_the_owner_saved_alone(self, converted: Any, tmp_path: Path) -> None:
        converted.model.save_pretrained(tmp_path)
        with pytest.raises(AttributeError, match=self.DTYPE):
            transformers.LlamaModel.from_pretrained(tmp_path)

    def test_copies_save_the_mark_too(self, converted: Any, tmp_path: Path) -> None:
        for duplicate in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
            duplicate.save_pretrained(tmp_path)
            saved = json.loads((tmp_path / "config.json").read_text())
            assert saved["model_type"] == "attnres_compile"
            assert saved["attnres_kept_model_type"] == "llama"
            assert saved["attnres_kept_dtype"] == "float32"

    def test_a_config_within_the_config_is_marked(self, tmp_path: Path) -> None:
        """transformers takes a fitting one for the config of a text model."""
        from attnres_compile.huggingface import _marked_twin

        text = by_name("gemma3").build().config.to_dict()
        config = transformers.Gemma3Config(text_config=text)
        _marked_twin(config).save_pretrained(tmp_path)
        with pytest.raises(AttributeError, match=self.DTYPE):
            transformers.Gemma3TextConfig.from_pretrained(tmp_path)

    @pytest.mark.filterwarnings("ignore:.*queries are not zero")
    def test_stripped_it_loads(self, converted: Any, tmp_path: Path) -> None:
        plain = attnres_compile.strip(converted)
        plain.save_pretrained(tmp_path)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(loaded) is transformers.LlamaForCausalLM
        assert error(logits(loaded), logits(plain)) == 0
        assert type(plain.config) is transformers.LlamaConfig
        assert plain.config is plain.model.config is plain.model.layers[0].self_attn.config
        assert_exact(converted)


class TestConfig:
    """In memory the config is what it was: one state with the layers', which keep the original."""

    def test_values(self, converted: Any) -> None:
        config = converted.config
        assert isinstance(config, transformers.LlamaConfig)
        assert config is converted.model.config
        assert config.model_type == config.to_dict()["model_type"] == "llama"
        assert type(config).__name__ == "LlamaConfig"
        duplicate = copy.copy(config)
        duplicate.hidden_size = 5
        assert config.hidden_size == 32

    @pytest.mark.parametrize("how", ["as_it_is", "deepcopied", "pickled"])
    def test_a_change_reaches_the_layers(self, converted: Any, how: str) -> None:
        model = converted
        if how == "deepcopied":
            model = copy.deepcopy(converted)
        elif how == "pickled":
            model = pickle.loads(pickle.dumps(converted))
        assert model.config._attn_implementation == "sdpa"
        model.set_attn_implementation("eager")
        for layer in model.model.layers:
            assert layer.self_attn.config._attn_implementation == "eager"
        assert_exact(model)
        assert how == "as_it_is" or converted.config._attn_implementation == "sdpa"

    def test_recording_asked_for_in_the_config(self, converted: Any) -> None:
        assert_exact(converted)
        converted.config.output_hidden_states = True
        assert len(converted(**llama_inputs()).hidden_states) == 3
        converted.config.output_hidden_states = False
        assert converted(**llama_inputs()).hidden_states is None
