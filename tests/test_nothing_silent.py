"""No path computes the unconverted network where one would expect the converted one.

Every path is either exact, against a forward pass written by hand, or raises with a sentence that
says what to do. Queries are random, so that a path without Attention Residuals would show.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import attnres_compile
from attnres_compile.errors import AttnResError, CaptureError, MismatchError
from conversions import (
    converted_llama,
    converted_tower,
    error,
    llama_inputs,
    llama_oracle_logits,
    randomize,
    tower_inputs,
    tower_oracle,
)
from zoo import by_name

X = tower_inputs()
EXACT = 1e-5
STOPPED = "this path would have computed the network without its Attention Residuals"


def assert_exact(actual: torch.Tensor, converted: Any, x: torch.Tensor = X) -> None:
    assert error(actual, tower_oracle(converted, x)) <= EXACT


def assert_stops(call: Callable[[], object], sentence: str = STOPPED) -> None:
    with pytest.raises(AttnResError, match=sentence):
        call()


def test_eager_call_is_exact_and_the_original_is_not() -> None:
    converted = converted_tower()
    assert_exact(converted(X), converted)
    plain = _untrained(copy.deepcopy(converted))
    assert error(plain(X), tower_oracle(converted, X)) > 1e-2


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_outer_compile_with_another_backend_stops(backend: str) -> None:
    converted = converted_tower()
    step = torch.compile(lambda x: converted(x) * 2, backend=backend)
    assert_stops(lambda: step(X))


def test_outer_compile_with_our_backend_is_exact() -> None:
    converted = converted_tower()
    step = torch.compile(lambda x: converted(x) * 2, backend="attnres", fullgraph=True)
    assert_exact(step(X) / 2, converted)
    step(X).square().sum().backward()
    compiled = {n: p.grad.clone() for n, p in converted.named_parameters()}
    converted.zero_grad()
    (converted(X) * 2).square().sum().backward()
    for name, parameter in converted.named_parameters():
        assert error(compiled[name], parameter.grad) <= 1e-4, name


def test_compiling_the_model_itself_is_exact() -> None:
    converted = converted_tower()
    assert_exact(torch.compile(converted, backend="attnres", fullgraph=True)(X), converted)


def test_force_eager_stops() -> None:
    converted = converted_tower()
    with torch.compiler.set_stance("force_eager"):
        assert_stops(lambda: converted(X))
    assert_exact(converted(X), converted)


def test_compile_disabled_around_the_call_is_exact() -> None:
    converted = converted_tower()
    assert_exact(torch.compiler.disable(converted.__call__)(X), converted)


@pytest.mark.parametrize("strict", [False, True])
def test_export_without_the_rewrite_stops(strict: bool) -> None:
    converted = converted_tower()
    program = torch.export.export(converted, (X,), strict=strict)
    assert_stops(lambda: program.module()(X))


def test_our_export_is_exact() -> None:
    converted = converted_tower()
    assert_exact(attnres_compile.export(converted, (X,)).module()(X), converted)


def test_recompile_limit_is_exact_or_stops() -> None:
    converted = converted_tower()
    with torch._dynamo.config.patch(recompile_limit=1):
        for batch in (2, 3, 4, 5):
            x = tower_inputs(batch)
            assert_exact(converted(x), converted, x)
        converted.double()
        x = X.double()
        assert error(converted(x), tower_oracle(converted, x)) <= 1e-10


def test_a_graph_break_stops() -> None:
    converted = converted_tower()
    converted.layers[1].breaks_graph = True
    with pytest.raises(CaptureError, match="could not be captured as one graph"):
        converted(X)


def test_checkpointing_is_exact() -> None:
    converted = converted_tower()
    converted.train()
    for layer in converted.layers:
        layer.dropout.p = 0.0
    converted.checkpointing = True
    assert_exact(converted(X), converted)


def test_deepcopy_runs_its_own_weights() -> None:
    converted = converted_tower()
    duplicate = copy.deepcopy(converted)
    randomize(duplicate, seed=9)
    with torch.no_grad():
        duplicate.stem.weight.mul_(1.5)
    assert_exact(duplicate(X), duplicate)
    assert_exact(converted(X), converted)
    assert error(duplicate(X), converted(X)) > 1e-2


def test_pickle_and_torch_save() -> None:
    converted = converted_tower()
    assert_exact(pickle.loads(pickle.dumps(converted))(X), converted)
    file = io.BytesIO()
    torch.save(converted, file)
    file.seek(0)
    assert_exact(torch.load(file, weights_only=False)(X), converted)


def test_load_state_dict_by_assignment() -> None:
    converted, other = converted_tower(), converted_tower()
    randomize(other, seed=9)
    converted(X)  # compiled before the parameters are replaced
    converted.load_state_dict(other.state_dict(), assign=True)
    assert_exact(converted(X), other)


def test_functional_call() -> None:
    converted, other = converted_tower(), converted_tower()
    randomize(other, seed=9)
    weights = {name: p.detach().clone() for name, p in other.named_parameters()}
    assert_exact(torch.func.functional_call(converted, weights, (X,)), other)


def test_another_dtype() -> None:
    converted = converted_tower()
    converted(X)
    converted.double()
    x = X.double()
    assert error(converted(x), tower_oracle(converted, x)) <= 1e-10


def test_two_models_of_one_class() -> None:
    first, second = converted_tower(), converted_tower()
    randomize(second, seed=9)
    for model in (first, second, first):
        assert_exact(model(X), model)


def test_other_methods_of_the_owner() -> None:
    converted = converted_tower()
    features = converted.features(X)
    assert error(converted.head(features), tower_oracle(converted, X)) <= EXACT
    with pytest.raises(MismatchError, match="the plan has 4 residual additions, this call"):
        converted.first_features(X)
    expected = converted.head(converted.stem(X))
    assert torch.equal(converted.stem_and_head(X), expected)


def test_methods_of_a_timm_model() -> None:
    case = by_name("timm_vit")
    model = case.build()
    (x,), _ = case.inputs()
    converted = attnres_compile.convert(model, (x,))
    randomize(converted)
    expected = converted(x)
    features = converted.forward_features(x)
    assert error(converted.forward_head(features), expected) <= EXACT
    last, _ = converted.forward_intermediates(x)
    assert error(converted.forward_head(last), expected) <= EXACT
    assert_stops(lambda: converted.blocks(converted.patch_embed(x)), "call that module instead")


def test_inner_modules_of_a_language_model() -> None:
    converted = converted_llama()
    expected = llama_oracle_logits(converted)
    inputs = llama_inputs()
    assert error(converted(**inputs).logits.detach(), expected) <= EXACT
    hidden = converted.model(**inputs).last_hidden_state
    assert error(converted.lm_head(hidden).detach(), expected) <= EXACT
    recorded = converted(**inputs, output_hidden_states=True)
    assert error(recorded.logits.detach(), expected) <= EXACT
    assert len(recorded.hidden_states) == 3


def test_gradient_checkpointing_of_a_language_model() -> None:
    converted = converted_llama()
    expected = llama_oracle_logits(converted)
    converted.train()
    converted.gradient_checkpointing_enable()
    assert error(converted(**llama_inputs()).logits.detach(), expected) <= EXACT


def test_adapters_added_afterwards() -> None:
    import peft

    converted = converted_llama()
    inputs = llama_inputs()
    before = converted(**inputs).logits.detach()
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    adapted = peft.get_peft_model(converted, config).eval()
    assert error(adapted(**inputs).logits.detach(), before) <= EXACT  # adapters start at zero
    assert error(before, llama_oracle_logits(converted_llama())) <= EXACT


def test_saved_model_does_not_load_as_the_plain_one(tmp_path: Any) -> None:
    converted = converted_llama()
    converted.save_pretrained(tmp_path)
    for loader in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):
        with pytest.raises(Exception, match="attnres_compile"):
            loader.from_pretrained(tmp_path)
    plain = attnres_compile.strip(_untrained(converted))
    plain.save_pretrained(tmp_path / "plain")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(loaded) is transformers.LlamaForCausalLM


def _untrained(converted: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in converted.named_parameters():
            if name.endswith(".query"):
                parameter.zero_()
    return converted
