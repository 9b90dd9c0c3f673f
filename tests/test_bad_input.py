"""Bad input: one clear sentence each, and the model is unharmed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import attnres_compile
from attnres_compile import AttnResConfig
from attnres_compile.errors import (
    AlreadyConvertedError,
    AttnResError,
    BackendError,
    CaptureError,
    ConfigError,
    InputError,
    NothingToConvertError,
)
from attnres_compile.kernels import cpp_library


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(self.norm(x))


class Stack(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(depth)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Branching(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            x = x * 2
        return super().forward(x)


X = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def unharmed() -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Checks afterwards that a watched model computes and holds what it did."""
    watched: list[tuple[nn.Module, dict[str, Any], torch.Tensor]] = []

    def watch(model: nn.Module) -> nn.Module:
        watched.append((model, copy.deepcopy(model.state_dict()), model(X).detach()))
        return model

    yield watch
    assert watched
    for model, state, output in watched:
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert torch.equal(model(X), output)


def refused(kind: type[AttnResError], call: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        call()
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_no_residual_addition(unharmed: Any) -> None:
    model = unharmed(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
    sentence = refused(NothingToConvertError, lambda: attnres_compile.convert(model, (X,)))
    assert sentence == (
        "Sequential has no residual stream to convert: it has no residual addition x + f(x)."
    )


def test_one_sublayer_is_refused_with_its_place(unharmed: Any) -> None:
    model = unharmed(Stack(depth=1))
    sentence = refused(NothingToConvertError, lambda: attnres_compile.convert(model, (X,)))
    assert "a stream of one sublayer has nothing to choose from" in sentence
    assert "blocks.0, test_bad_input.py:" in sentence


def test_convolutions_without_a_batch_dimension() -> None:
    class Convolutions(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for conv in self.convs:
                x = x + conv(torch.relu(x))
            return x

    model = Convolutions()
    image = torch.randn(8, 6, 6)
    sentence = refused(NothingToConvertError, lambda: attnres_compile.convert(model, (image,)))
    assert "convolutions without a batch dimension, so its channel is dimension 0" in sentence
    converted = attnres_compile.convert(model, (image[None],))
    assert torch.allclose(converted(image[None]), model(image[None]), atol=1e-6)


def test_inputs_that_cannot_be_inferred(unharmed: Any) -> None:
    model = unharmed(Branching())
    sentence = refused(InputError, lambda: attnres_compile.convert(model))
    assert sentence.startswith("the inputs of Branching cannot be inferred; pass example inputs")


def test_unknown_stream(unharmed: Any) -> None:
    model = unharmed(Stack())
    config = AttnResConfig(streams=("!encoder",))
    sentence = refused(ConfigError, lambda: attnres_compile.plan(model, (X,), config=config))
    assert sentence == (
        "streams='!encoder' matches no residual stream of this model; it has: blocks."
    )


def test_more_blocks_than_the_deepest_stream(unharmed: Any) -> None:
    model = unharmed(Stack())
    config = AttnResConfig(num_blocks=4)
    sentence = refused(ConfigError, lambda: attnres_compile.convert(model, (X,), config=config))
    assert sentence == (
        "num_blocks=4 is more than the 3 sublayers of the model's deepest stream; ask for at most "
        "3, or for 'full'."
    )
    fits = attnres_compile.plan(model, (X,), config=AttnResConfig(num_blocks=3))
    assert len(fits.streams[0].blocks) == 3


def test_both_block_options() -> None:
    sentence = refused(ConfigError, lambda: AttnResConfig(num_blocks=2, block_sublayers=2))
    assert "set only one of them" in sentence


def test_mixed_devices() -> None:
    model = Stack()
    model.blocks[1].to("meta")
    sentence = refused(InputError, lambda: attnres_compile.convert(model, (X,)))
    assert sentence.startswith("Stack lies on several devices (cpu, meta); move it to one device")


def test_converting_twice(unharmed: Any) -> None:
    model = unharmed(Stack())
    converted = attnres_compile.convert(model, (X,))
    for again in (attnres_compile.convert, attnres_compile.plan):
        sentence = refused(AlreadyConvertedError, lambda again=again: again(converted, (X,)))
        assert sentence == ("Stack was converted already; convert the original, or strip() first.")


def test_not_captured_whole(unharmed: Any) -> None:
    model = unharmed(Branching())
    sentence = refused(CaptureError, lambda: attnres_compile.convert(model, (X,)))
    assert "Branching could not be captured as one graph" in sentence
    assert "test_bad_input.py:" in sentence
    assert "Ways forward" in sentence


def test_forward_replaced_on_the_instance() -> None:
    model = Stack()
    plan = attnres_compile.plan(model, (X,))
    model.forward = model.forward  # type: ignore[method-assign]
    sentence = refused(InputError, lambda: attnres_compile.convert(model, (X,), plan=plan))
    assert "forward of the model was replaced on the instance" in sentence


def test_a_child_named_attnres() -> None:
    model = Stack()
    model.attnres = nn.Linear(2, 2)
    sentence = refused(InputError, lambda: attnres_compile.convert(model, (X,)))
    assert sentence == "the model has a child named 'attnres' already."


def test_not_a_module() -> None:
    sentence = refused(InputError, lambda: attnres_compile.plan("llama"))  # type: ignore[arg-type]
    assert sentence == "expected a torch.nn.Module, not str."


def test_an_attribute_named_plan(unharmed: Any) -> None:
    class Planner(Stack):
        def plan(self) -> int:
            return 1

    model = unharmed(Planner())
    sentence = refused(InputError, lambda: attnres_compile.convert(model, (X,)))
    assert sentence == (
        "Planner has an attribute named 'plan' already, where a converted model keeps its plan; "
        "rename it."
    )
    inside = nn.Sequential(Planner())
    assert torch.equal(attnres_compile.convert(inside, (X,))(X), inside(X))


def test_compiled_before() -> None:
    model = torch.compile(Stack())
    for call in (attnres_compile.convert, attnres_compile.plan):
        sentence = refused(InputError, lambda call=call: call(model, (X,)))
        assert sentence.startswith("the model was compiled before; convert it first")


def test_arguments_of_another_type() -> None:
    model = Stack()
    for call in (attnres_compile.convert, attnres_compile.plan):
        sentence = refused(InputError, lambda call=call: call(model, X))
        assert sentence.endswith("it is a Tensor: pass (x,) for one input x.")
        sentence = refused(InputError, lambda call=call: call(model, (), X))
        assert sentence.endswith("as a dictionary; it is a Tensor.")
        sentence = refused(ConfigError, lambda call=call: call(model, (X,), config={"eps": 1.0}))
        assert sentence.endswith("as in AttnResConfig(num_blocks=4); it is a dict.")


def test_an_owner_with_a_parametrized_weight() -> None:
    class Scaled(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x * self.scale)

    model = Scaled()
    nn.utils.parametrize.register_parametrization(model, "scale", nn.Softplus())
    sentence = refused(InputError, lambda: attnres_compile.convert(model, (X,)))
    assert sentence.startswith("the model has a parametrized weight; convert the model before")
    below = Stack()
    nn.utils.parametrizations.weight_norm(below.blocks[1].linear)
    assert torch.equal(attnres_compile.convert(below, (X,))(X), below(X))


def test_plan_and_config_together() -> None:
    model = Stack()
    plan = attnres_compile.plan(model, (X,))
    sentence = refused(
        ConfigError,
        lambda: attnres_compile.convert(model, (X,), plan=plan, config=AttnResConfig()),
    )
    assert sentence == "a plan has its config already; pass either plan or config."


def test_strip_and_export_of_an_unconverted_model() -> None:
    for call in (attnres_compile.strip, attnres_compile.export):
        sentence = refused(InputError, lambda call=call: call(Stack()))
        assert "was not converted" in sentence


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.cpp_builder as builder
    from torch._inductor import config, exc

    def none_found(*_args: object) -> str:
        raise exc.InvalidCxxCompiler

    cpp_library.prepare(torch.float32)  # that it cannot be built is another error
    converted = attnres_compile.convert(Stack(), (X,), executor="attnres")
    monkeypatch.setattr(builder, "get_cpp_compiler", none_found)
    with config.patch(force_disable_caches=True):  # or a kernel compiled before would do
        sentence = refused(BackendError, lambda: converted(X))
    assert sentence.startswith("Inductor needs a C++ compiler for the CPU and found none")


def test_a_model_sharded_layer_by_layer(tmp_path: Any) -> None:
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = Stack()
        mesh = distributed.init_device_mesh("cpu", (1,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        sentence = refused(InputError, lambda: attnres_compile.convert(model, (X,)))
    finally:
        distributed.destroy_process_group()
    assert sentence.startswith("blocks.0 is wrapped by fully_shard; convert the model first")
