"""Tools of PyTorch around a converted model: the Attention Residuals apply, or it raises.

Tracers, function transforms, threads, checkpointing, regional compilation, sharding, generation.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import attnres_compile
from attnres_compile import AttnResConfig
from attnres_compile.errors import CaptureError, UnconvertedPathError
from conversions import (
    NUM_BLOCKS,
    Tower,
    converted_llama,
    converted_tower,
    error,
    llama_inputs,
    randomize,
    tower,
    tower_inputs,
    tower_oracle,
)

EXACT = 1e-6
UNCONVERTED = "^this path would have computed the network without its Attention Residuals"


def assert_exact(model: Any, run: Callable[[Tensor], Tensor] | None = None, batch: int = 6) -> None:
    x = tower_inputs(batch)
    assert error((run or model)(x), tower_oracle(model, x)) < EXACT


def converted_like(model: Tower) -> Any:
    """Converts this very model, not a copy of it."""
    config = AttnResConfig(num_blocks=NUM_BLOCKS)
    converted = attnres_compile.convert(model, (tower_inputs(),), config=config)
    randomize(converted)
    return converted


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(lambda model, x: model.forward(x), id="forward"),
        pytest.param(lambda model, x: nn.Module.__call__(model, x), id="call"),
        pytest.param(lambda model, x: copy.copy(model)(x), id="shallow_copy"),
        pytest.param(lambda model, x: torch.inference_mode()(model)(x).clone(), id="inference"),
        pytest.param(lambda model, x: nn.Sequential(model)(x), id="within_another"),
    ],
)
def test_ways_of_calling_apply(run: Callable[[Any, Tensor], Tensor]) -> None:
    converted = converted_tower()
    assert_exact(converted, lambda x: run(converted, x))


@pytest.mark.parametrize(
    "trace",
    [
        pytest.param(lambda model, x: torch.jit.trace(model, (x,)), id="jit_trace"),
        pytest.param(lambda model, _x: torch.fx.symbolic_trace(model), id="symbolic_trace"),
        pytest.param(lambda model, x: make_fx(lambda x: model(x))(x), id="make_fx"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_other_tracers_raise(trace: Callable[[Any, Tensor], Any]) -> None:
    with pytest.raises(RuntimeError, match="a dynamo-optimized function"):
        trace(converted_tower(), tower_inputs())


@pytest.mark.parametrize(
    "transform",
    [
        pytest.param(lambda model, x: torch.vmap(model)(x), id="vmap"),
        pytest.param(lambda model, x: torch.func.grad(lambda x: model(x).sum())(x), id="grad"),
        pytest.param(lambda model, x: torch.func.jvp(model, (x,), (x,)), id="jvp"),
    ],
)
def test_function_transforms_raise(transform: Callable[[Any, Tensor], Any]) -> None:
    with pytest.raises(
        CaptureError,
        match=r"^Tower is converted, and cannot be .* torch.func",
    ):
        transform(converted_tower(), tower_inputs())


def test_threads_run_beside_each_other() -> None:
    """While one thread compiles, torch.compiler.is_compiling() is true in the others."""
    converted = converted_tower()
    errors: dict[int, float | Exception] = {}

    def run(batch: int) -> None:
        x = tower_inputs(batch)
        try:
            errors[batch] = max(
                error(converted(x), tower_oracle(converted, x)),
                error(converted.head(converted.features(x)), tower_oracle(converted, x)),
            )
        except Exception as raised:
            errors[batch] = raised

    threads = [threading.Thread(target=run, args=(batch,)) for batch in (3, 4, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(errors) == [3, 4, 5]
    assert all(isinstance(value, float) and value < EXACT for value in errors.values()), errors


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_the_whole_model_checkpointed_applies(use_reentrant: bool) -> None:
    converted, reference = converted_tower(), converted_tower()
    x = tower_inputs().requires_grad_()
    output = checkpoint(converted, x, use_reentrant=use_reentrant)
    output.square().sum().backward()
    assert error(output, tower_oracle(reference, tower_inputs())) < EXACT
    tower_oracle(reference, tower_inputs()).square().sum().backward()
    for (name, parameter), other in zip(
        converted.named_parameters(), reference.parameters(), strict=True
    ):
        if "attnres" not in name:  # the oracle takes copies of these
            assert parameter.grad is not None
            assert other.grad is not None
            assert error(parameter.grad, other.grad) < 1e-5, name


class TestModuleCompile:
    """`module.compile()` keeps a compiled call on the module itself."""

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_of_the_layers_applies(self, when: str) -> None:
        model = tower()
        converted = converted_like(model) if when == "after" else None
        for layer in model.layers:
            layer.compile(backend="aot_eager")  # type: ignore[no-untyped-call]
        assert_exact(converted or converted_like(model))

    def test_of_the_original_does_not_stay_with_the_converted(self) -> None:
        model = tower()
        model.compile(backend="aot_eager")  # type: ignore[no-untyped-call]
        expected = model(tower_inputs())
        assert_exact(converted_like(model))
        assert error(model(tower_inputs()), expected) == 0

    def test_of_the_converted_with_another_backend_raises(self) -> None:
        converted = converted_tower()
        converted.compile(backend="aot_eager")
        with pytest.raises(UnconvertedPathError, match=UNCONVERTED):
            converted(tower_inputs())

    def test_of_the_converted_with_our_backend_applies(self) -> None:
        converted = converted_tower()
        converted.compile(backend="attnres", fullgraph=True)
        assert_exact(converted)


def test_parametrized_weights_apply() -> None:
    class Scaled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 1.5 * weight

    converted = converted_tower()
    assert_exact(converted)
    for module in (converted.layers[1].linear, converted.stem):
        nn.utils.parametrize.register_parametrization(module, "weight", Scaled())
        assert_exact(converted)


def test_the_root_sharded_by_fsdp_applies(tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    expected = tower_oracle(converted_tower(), tower_inputs())
    store = f"file://{tmp_path}/store"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        whole, by_layer = converted_tower(), converted_tower()
        fully_shard(whole, mesh=mesh)
        output = whole(tower_inputs())
        output.sum().backward()
        for layer in by_layer.layers:
            fully_shard(layer, mesh=mesh)
        with pytest.raises(CaptureError, match=r"^Tower could not be captured as one graph"):
            by_layer(tower_inputs())
    finally:
        distributed.destroy_process_group()
    assert error(output, expected) < EXACT
    assert all(parameter.grad is not None for parameter in whole.parameters())


def test_generation_that_compiles_by_itself_raises() -> None:
    """On accelerators transformers compiles the decoding step when the cache is static."""
    from transformers import CompileConfig

    converted = converted_llama()
    settings = CompileConfig(backend="aot_eager", fullgraph=False)
    settings._compile_all_devices = True
    with pytest.raises(UnconvertedPathError, match=UNCONVERTED):
        converted.generate(
            llama_inputs()["input_ids"],
            max_new_tokens=3,
            do_sample=False,
            cache_implementation="static",
            compile_config=settings,
        )
