"""Whole models with delta sources and the tools around them: saving, exporting, compiling."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attnres_compile
import oracle_deltas
from attnres_compile.errors import ConfigError
from conversions import randomize
from delta_cases import CASES, CONFIG, TOLERANCE, WIDTH, Case, assert_same_gradient, values
from tolerances import relative_error
from zoo_conversion import run


def converted_encoder(**options: Any) -> tuple[Any, Tensor]:
    model, inputs = CASES[2].build()
    converted = attnres_compile.convert(model, (inputs,), config=CONFIG, **options)
    randomize(converted)
    return converted, inputs


def test_saved_and_loaded(tmp_path: Path) -> None:
    converted, inputs = converted_encoder()
    attnres_compile.save(converted, tmp_path / "new.safetensors", new_only=True)
    loaded = attnres_compile.load(tmp_path / "new.safetensors", CASES[2].build()[0])
    assert loaded.plan == converted.plan
    assert loaded.plan.streams[0].deltas
    assert torch.equal(loaded(inputs), converted(inputs))


def test_exported() -> None:
    converted, inputs = converted_encoder()
    program = attnres_compile.export(converted, (inputs,))
    assert relative_error(program.module()(inputs), converted(inputs)) <= TOLERANCE


def test_graphs_are_converted_too() -> None:
    """An ExportedProgram and a GraphModule, as they are: the same sites and values."""
    converted, inputs = converted_encoder()
    model = CASES[2].build()[0]
    program = attnres_compile.convert(torch.export.export(model, (inputs,)), config=CONFIG)
    found: Any = program
    assert found.plan.num_parameters == converted.plan.num_parameters
    assert relative_error(found.module()(inputs), model(inputs)) <= TOLERANCE
    deep = CASES[4].build()[0]
    graph = torch.fx.symbolic_trace(deep)
    traced: Any = attnres_compile.convert(graph, (inputs,), config=CONFIG)
    assert traced.plan.num_residual_additions == 5
    assert relative_error(traced(inputs), deep(inputs)) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_the_backend_takes_differences_as_sources(kernels: str) -> None:
    """Five sources and two sites a block, so that blocks are computed in two phases."""
    model, inputs = Case("", lambda: oracle_deltas.DeepNorm(WIDTH, 8), values, {}, None).build()
    converted: Any = attnres_compile.convert(model, (inputs,), config=CONFIG)
    randomize(converted)
    expected = run(converted, ((inputs,), {}))
    compiled: Any = torch.compile(
        converted, backend="attnres", fullgraph=True, options={"kernels": kernels}
    )
    gradients = {name: g.clone() for name, g in expected.gradients.items()}
    converted.zero_grad(set_to_none=True)
    assert relative_error(compiled(inputs), converted(inputs)) <= TOLERANCE
    converted.zero_grad(set_to_none=True)
    run_compiled = run(_Named(compiled, converted), ((inputs,), {}))
    for name, gradient in gradients.items():
        assert_same_gradient(run_compiled.gradients[name], gradient, name)


class _Named(nn.Module):
    """A compiled model under the parameter names of the original."""

    def __init__(self, compiled: Any, model: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(compiled=compiled, model=model)

    def forward(self, *args: Any) -> Any:
        return self.__dict__["compiled"](*args)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["model"].named_parameters(*args, **kwargs)


class Checkpointed(nn.Module):
    """Post-norm layers, each behind torch.utils.checkpoint."""

    def __init__(self, inner: nn.Module, use: bool) -> None:
        super().__init__()
        self.inner = inner
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        inner: Any = self.inner
        for layer in inner.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.use else layer(x)
        return x


def test_checkpointed_layers_are_entered() -> None:
    results = []
    for use in (False, True):
        inner, inputs = CASES[2].build()
        model = Checkpointed(inner, use)
        converted: Any = attnres_compile.convert(model, (inputs,), config=CONFIG)
        assert converted.plan.num_residual_additions == 6
        randomize(converted)
        results.append(run(converted, ((inputs,), {})))
    plain, checkpointed = results
    assert relative_error(checkpointed.outputs[0], plain.outputs[0]) <= TOLERANCE
    assert checkpointed.gradients.keys() == plain.gradients.keys()
    for name, gradient in plain.gradients.items():
        assert_same_gradient(checkpointed.gradients[name], gradient, name)


@pytest.mark.slow
def test_a_model_with_and_one_without_in_one_graph() -> None:
    """Each of two converted models in an outer compile keeps its own kind of analysis."""
    first, inputs = converted_encoder()
    norm_first = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True, norm_first=True)
    plain = nn.TransformerEncoder(norm_first, 2, enable_nested_tensor=False).double().eval()
    second: Any = attnres_compile.convert(plain, (inputs,))
    randomize(second)
    both = torch.compile(
        lambda x: second(first(x)),
        backend="attnres",
        fullgraph=True,
        options={"kernels": "reference"},
    )
    assert relative_error(both(inputs), second(first(inputs))) <= TOLERANCE


def test_foreign_names_cannot_express_it(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, aggregate="mean")
    model, inputs = CASES[2].build()
    converted = attnres_compile.convert(model, (inputs,), config=config)
    with pytest.raises(ConfigError, match="differences of states"):
        attnres_compile.save(converted, tmp_path / "x.safetensors", names="kimi")


def test_the_plan_says_so() -> None:
    model, inputs = CASES[4].build()
    with_deltas = str(attnres_compile.plan(model, (inputs,), config=CONFIG))
    assert "the root, and the differences that blocks make to the state" in with_deltas
    plain = transformers.GPT2Model(transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2))
    assert "differences" not in str(attnres_compile.plan(plain, config=CONFIG))
