"""Compiling, exporting and switching compilation off: the Attention Residuals apply, or it raises.

The queries are random, so that the unconverted network's output is far away; every test asserts
"applied exactly" or "raised with this sentence". (test_nothing_silent.py has the plain cases.)
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnres_compile
from attnres_compile import execution
from attnres_compile.errors import CaptureError, MismatchError, UnconvertedPathError
from conversions import (
    Tower,
    convert_randomized,
    converted_tower,
    error,
    tower,
    tower_inputs,
    tower_oracle,
)

UNCONVERTED = "^this path would have computed the network without its Attention Residuals"
METHOD_OR_BREAK = (
    "this graph holds a part of a converted model whose call is not in it: another method than "
    "forward was called (call it outside of torch.compile), or the graph breaks within the model"
)
EXACT = 1e-6


def compiled(function: Callable[..., Any], backend: str, **options: Any) -> Callable[..., Any]:
    """`function` under an outer torch.compile, with a code object that is compiled anew."""
    return torch.compile(lambda x: function(x), backend=backend, **options)


def assert_exact(
    model: Any, x: Tensor | None = None, run: Callable[[Tensor], Tensor] | None = None
) -> None:
    """`run(x)` equals the formula with the model's weights; the unconverted network does not."""
    x = tower_inputs() if x is None else x
    expected = tower_oracle(model, x)
    assert error((run or model)(x), expected) < EXACT
    assert error(plain_tower(model)(x), expected) > 0.1


def plain_tower(converted: Any) -> Tower:
    plain = tower()
    plain.load_state_dict(converted.state_dict(), strict=False)
    return plain


class TestOuterCompile:
    """Dynamo inlines the converted forward into the caller's graph and forgets its backend."""

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    @pytest.mark.parametrize("method", ["features", "first_features"])
    def test_another_method_in_another_backend_raises(self, backend: str, method: str) -> None:
        converted = converted_tower()
        with pytest.raises(UnconvertedPathError, match=UNCONVERTED):
            compiled(getattr(converted, method), backend)(tower_inputs())

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_the_module_itself_in_another_backend_raises(self, backend: str) -> None:
        with pytest.raises(UnconvertedPathError, match=UNCONVERTED):
            torch.compile(converted_tower(), backend=backend)(tower_inputs())

    def test_no_pass_for_inference_removes_the_marker(self) -> None:
        converted = converted_tower()
        with torch.no_grad(), pytest.raises(UnconvertedPathError, match=UNCONVERTED):
            compiled(converted, "aot_eager")(tower_inputs())

    @pytest.mark.slow
    def test_two_calls_in_one_graph_apply(self) -> None:
        converted, reference = converted_tower(), converted_tower()

        def step(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            return model(x * 2).square().mean() + model(x).mean()

        loss = compiled(lambda x: step(converted, x), "attnres", fullgraph=True)(tower_inputs())
        loss.backward()
        expected = step(lambda x: tower_oracle(reference, x), tower_inputs())
        assert error(loss, expected) < 1e-5
        step(reference, tower_inputs()).backward()
        for (name, parameter), other in zip(
            converted.named_parameters(), reference.parameters(), strict=True
        ):
            assert parameter.grad is not None
            assert other.grad is not None
            assert error(parameter.grad, other.grad) < 1e-5, name

    def test_a_graph_break_around_the_model_is_harmless(self) -> None:
        converted = converted_tower()

        def step(x: Tensor) -> Tensor:
            x = x * 1.0
            torch._dynamo.graph_break()
            return converted(x)

        assert_exact(converted, run=compiled(step, "attnres"))

    def test_a_graph_break_within_the_model_raises(self) -> None:
        converted = converted_tower()
        converted.layers[1].breaks_graph = True
        with pytest.raises(Exception, match=re.escape(METHOD_OR_BREAK)) as raised:
            compiled(converted, "attnres")(tower_inputs())
        assert "MismatchError" in str(raised.value)

    def test_another_method_in_our_backend_applies(self) -> None:
        converted = converted_tower()
        for run in (converted.features, Features(converted)):
            features = compiled(run, "attnres", fullgraph=True)
            assert_exact(converted, run=lambda x, features=features: converted.head(features(x)))

    def test_another_method_through_other_layers_raises(self) -> None:
        converted = converted_tower()
        with pytest.raises(Exception, match=r"plan has 4 residual additions, this call .* has 2"):
            compiled(converted.first_features, "attnres")(tower_inputs())

    def test_another_method_called_twice_raises(self) -> None:
        converted = converted_tower()
        sentence = (
            "a method of a converted model is called more than once in this graph, and its calls "
            "cannot be told apart; call it outside of torch.compile"
        )
        for step in (
            lambda x: converted.features(x) - converted.features(2 * x),
            lambda x: (converted(x), converted.features(x)),
        ):
            with pytest.raises(Exception, match=sentence):
                compiled(step, "attnres")(tower_inputs())

    def test_methods_of_two_models_in_one_graph_raise(self) -> None:
        first, second = converted_tower(), converted_tower()
        with pytest.raises(Exception, match=re.escape(METHOD_OR_BREAK)):
            compiled(lambda x: first.features(x) - second.features(x), "attnres")(tower_inputs())

    def test_a_method_without_layers_is_left_alone(self) -> None:
        converted = converted_tower()
        run = compiled(converted.stem_and_head, "eager", fullgraph=True)
        assert error(run(tower_inputs()), tower().stem_and_head(tower_inputs())) == 0


class TestSwitchedOffCompilation:
    @pytest.mark.parametrize("stance", ["force_eager", "eager_on_recompile"])
    @pytest.mark.parametrize("called_before", [True, False])
    def test_stances_that_run_the_original_bytecode(self, stance: str, called_before: bool) -> None:
        converted = converted_tower()
        if called_before:
            assert_exact(converted)
        with torch.compiler.set_stance(stance):
            if called_before and stance == "eager_on_recompile":
                assert_exact(converted)
            else:
                with pytest.raises(UnconvertedPathError, match=UNCONVERTED):
                    converted(tower_inputs())
        assert_exact(converted)

    @pytest.mark.parametrize("recursive", [True, False])
    def test_disable_around_the_call_applies(self, recursive: bool) -> None:
        """It keeps Dynamo from the caller; the converted forward asks for it again."""
        converted = converted_tower()

        def step(x: Tensor) -> Tensor:
            return converted(x)

        assert_exact(converted, run=torch.compiler.disable(step, recursive=recursive))

    def test_disable_within_an_outer_compile_applies(self) -> None:
        converted = converted_tower()
        disabled = torch.compiler.disable(lambda x: converted(x))
        assert_exact(converted, run=compiled(lambda x: disabled(x * 1.0), "eager"))

    def test_all_of_dynamo_switched_off_raises(self) -> None:
        converted = converted_tower()
        nothing = "^Tower could not be captured as one graph: .*found no compiled frames"
        with torch._dynamo.config.patch(disable=True):
            with pytest.raises(UnconvertedPathError, match=UNCONVERTED):
                converted(tower_inputs())
            with pytest.raises(CaptureError, match=nothing):
                attnres_compile.plan(tower(), (tower_inputs(),))


class Features(nn.Module):
    """Calls another method of a converted model than forward."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.model.features(x)
        return features


class TestExport:
    def test_decompositions_keep_the_marker(self) -> None:
        program = torch.export.export(converted_tower(), (tower_inputs(),)).run_decompositions()
        with pytest.raises(UnconvertedPathError, match=UNCONVERTED):
            program.module()(tower_inputs())

    def test_another_method_raises(self) -> None:
        wrapper = Features(converted_tower())
        program = torch.export.export(wrapper, (tower_inputs(),))
        with pytest.raises(UnconvertedPathError, match=UNCONVERTED):
            program.module()(tower_inputs())
        with pytest.raises(MismatchError, match="stream 'layers': the plan has 4 residual"):
            attnres_compile.export(wrapper, (tower_inputs(),))

    def test_a_wrapper_around_a_converted_model_applies(self) -> None:
        converted = converted_tower()
        wrapper = nn.Sequential(nn.Identity(), converted)
        program = attnres_compile.export(wrapper, (tower_inputs(),))
        assert_exact(converted, run=program.module())


class TestRecompilation:
    def test_beyond_our_own_limit_raises(self, monkeypatch: pytest.MonkeyPatch) -> None:
        limit_to_one(monkeypatch)
        converted = converted_tower()
        assert_exact(converted)
        sentence = (
            r"^Tower was called in more ways \(shapes, modes, dtypes\) than Dynamo's recompile "
            r"limit admits; raise torch._dynamo.config.recompile_limit, or keep sizes dynamic\. "
        )
        with torch.no_grad(), pytest.raises(UnconvertedPathError, match=sentence):
            converted(tower_inputs())

    def test_models_of_one_class_do_not_share_a_limit(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        limit_to_one(monkeypatch)
        models = [converted_tower() for _ in range(3)]
        for scale, model in enumerate(models, start=1):
            with torch.no_grad():
                model.stem.weight.mul_(scale)
        for model in [*models, *models]:
            assert_exact(model)


def limit_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def tracing(*_args: Any) -> Any:
        return torch._dynamo.config.patch(recompile_limit=1)

    monkeypatch.setattr(execution, "tracing", tracing)


class TestAnotherWayThroughTheModel:
    def test_a_graph_break_before_the_conversion_raises(self) -> None:
        model = tower()
        model.layers[1].breaks_graph = True
        place = r"^Tower could not be captured as one graph at conversions\.py:\d+ \(in forward\): "
        with pytest.raises(CaptureError, match=place):
            attnres_compile.convert(model, (tower_inputs(),))

    def test_a_layer_taken_out_raises(self) -> None:
        converted = converted_tower()
        assert_exact(converted)
        del converted.layers[3]
        sentence = (
            "^stream 'layers': the plan has 4 residual additions, this call of the model has 3; "
            r"without the addition 0 of layers\.3\. Plan it with example inputs that take the same"
        )
        with pytest.raises(MismatchError, match=sentence):
            converted(tower_inputs())

    def test_a_layer_with_another_addition_raises(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                x = x + self.linear(x)
                return x + self.linear(x)

        converted = converted_tower()
        converted.layers[1] = Twice()
        with pytest.raises(
            MismatchError, match="this call of the model has 5; with the addition 1"
        ):
            converted(tower_inputs())


class TestHooks:
    """Dynamo does not look for hooks that appear after its first call, unless it is told to."""

    def test_forward_hooks_on_layers_run(self) -> None:
        converted = converted_tower()
        assert_exact(converted)
        expected = converted(tower_inputs())
        seen: list[Tensor] = []
        layers = converted.layers
        handles = [
            layers[2].linear.register_forward_hook(lambda _m, _args, out: seen.append(out)),
            layers[1].norm.register_forward_pre_hook(lambda _m, args: (args[0] * 0.0,)),
        ]
        changed = converted(tower_inputs())
        for handle in handles:
            handle.remove()
        assert [tensor.shape for tensor in seen] == [(6, 8)]
        assert error(changed, expected) > 1e-3
        assert error(converted(tower_inputs()), expected) == 0

    def test_hooks_on_the_owner_run(self) -> None:
        converted = converted_tower()
        assert_exact(converted)
        converted.register_forward_hook(lambda _m, _args, out: -out)
        assert_exact(converted, run=lambda x: -converted(x))

    def test_global_hooks_run(self) -> None:
        converted = converted_tower()
        assert_exact(converted)
        seen: list[str] = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, _args, _out: seen.append(type(module).__name__)
        )
        try:
            output = converted(tower_inputs())
        finally:
            handle.remove()
        assert error(output, tower_oracle(converted, tower_inputs())) < EXACT
        assert seen.count("Linear") == 6
        converted(tower_inputs())
        assert seen.count("Tower") == 1

    def test_backward_hooks_in_the_stream_raise(self) -> None:
        converted = converted_tower()
        converted.layers[1].linear.register_full_backward_hook(lambda *_: None)
        with pytest.raises(CaptureError, match="Module-level backwards hooks require compiled"):
            converted(tower_inputs())

    def test_saved_tensor_hooks_see_no_tensors_of_the_tracing(self) -> None:
        converted = converted_tower()
        kinds: set[str] = set()

        def pack(tensor: Tensor) -> Tensor:
            kinds.add(type(tensor).__name__)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            converted(tower_inputs())
        assert kinds <= {"Tensor", "Parameter"}


def test_training_mode_reaches_every_module() -> None:
    converted = converted_tower()
    for training in (True, False, True):
        assert converted.train(training) is converted
        assert {module.training for module in converted.modules()} == {training}
    dropped = converted(tower_inputs())
    assert error(dropped, tower_oracle(converted.eval(), tower_inputs())) > 1e-2
    assert_exact(converted)


def test_models_with_other_layouts_are_independent() -> None:
    first, second = converted_tower(), convert_randomized(tower(), (tower_inputs(),))
    with torch.no_grad():
        second.head.weight.mul_(2)
    for _ in range(2):
        assert_exact(first)
        assert error(second(tower_inputs()), tower_oracle(second, tower_inputs(), "auto")) < EXACT
