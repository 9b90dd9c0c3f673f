"""Modes a converted model is used in: sizes, training, autocast, checkpointing, compile, export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

import attnres_compile
from conversions import (
    converted_llama,
    converted_tower,
    error,
    llama_inputs,
    llama_oracle_logits,
    randomize,
    tower,
    tower_inputs,
    tower_oracle,
)

X = tower_inputs()
EXACT = 1e-5


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-4
) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert error(actual[name], gradient) <= tolerance, name


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_other_batch_sizes(batch: int) -> None:
    converted = converted_tower()
    converted(X)
    x = tower_inputs(batch)
    assert error(converted(x), tower_oracle(converted, x)) <= EXACT


def test_other_lengths_and_one_token() -> None:
    converted = converted_llama()
    ids = llama_inputs()["input_ids"]
    whole = converted(input_ids=ids, use_cache=False).logits
    for length in (1, 2, ids.shape[1] - 1):
        part = converted(input_ids=ids[:, :length], use_cache=False).logits
        assert error(part, whole[:, :length]) <= EXACT  # causal: a prefix is the same alone


def test_cache_in_and_out() -> None:
    converted = converted_llama()
    ids = llama_inputs()["input_ids"]
    whole = converted(input_ids=ids, use_cache=False).logits
    first = converted(input_ids=ids[:, :3], use_cache=True)
    second = converted(input_ids=ids[:, 3:], past_key_values=first.past_key_values, use_cache=True)
    assert error(torch.cat([first.logits, second.logits], 1), whole) <= EXACT


def test_labels_and_positional_arguments() -> None:
    converted = converted_llama()
    ids = llama_inputs()["input_ids"]
    labelled = converted(input_ids=ids, labels=ids)
    expected = nn.functional.cross_entropy(
        labelled.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    assert error(labelled.loss, expected) <= EXACT
    assert error(converted(ids).logits, labelled.logits) <= EXACT


def test_dropout_falls_as_in_the_original() -> None:
    plain = tower().train()
    converted = attnres_compile.convert(tower(), (X,)).train()
    outputs = []
    for model in (plain, converted):
        torch.manual_seed(11)
        outputs.append(model(X))
    assert error(outputs[1], outputs[0]) <= EXACT  # zero queries: the same function, the same masks
    assert error(converted(X), outputs[0]) > 1e-2  # other masks
    converted.eval()
    assert error(converted(X), tower()(X)) <= EXACT


def test_dropout_statistics() -> None:
    converted = converted_tower().train()
    x = torch.ones(4000, 5)
    with torch.no_grad():
        means = converted(x).mean(0), converted(x).mean(0)
        assert not torch.equal(*means)
        assert error(*means) < 0.1
        assert converted.eval()(x).std(0).max() < 1e-5


def test_training_reaches_a_lower_loss() -> None:
    converted = converted_tower()
    target = torch.randn(6, 3)
    optimizer = torch.optim.AdamW(attnres_compile.param_groups(converted, lr=1e-2))
    losses = []
    for _ in range(8):
        loss = (converted(X) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    assert error(converted(X), tower_oracle(converted, X)) <= EXACT


def test_autocast() -> None:
    converted = converted_tower()
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = converted(X), tower_oracle(converted, X)
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert error(actual.float(), expected.float()) <= 2e-2
    assert error(actual.float(), converted(X)) > 1e-5  # it was on


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    converted = converted_llama(dtype)
    queries = [p for n, p in converted.named_parameters() if n.endswith(".query")]
    assert {q.dtype for q in queries} == {dtype}
    with torch.no_grad():
        actual = converted(**llama_inputs(dtype)).logits
    tolerance = 1e-10 if dtype == torch.float64 else 5e-2
    assert error(actual.double(), llama_oracle_logits(converted, dtype).double()) <= tolerance


def bytes_saved(model: nn.Module, x: torch.Tensor) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes of distinct storages kept for the backward pass, and the gradients of a loss."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(x).square().sum()
    return sum(saved.values()), gradients(model, loss)


def test_checkpointing_saves_bytes_and_changes_nothing() -> None:
    converted = converted_tower().train()
    for layer in converted.layers:
        layer.dropout.p = 0.3
    x = tower_inputs(64)
    results = []
    for checkpointing in (False, True):
        converted.checkpointing = checkpointing
        converted(x)  # compile outside of the measurement
        torch.manual_seed(2)
        results.append(bytes_saved(converted, x))
    (plain_bytes, expected), (fewer_bytes, actual) = results
    assert fewer_bytes < 0.7 * plain_bytes
    assert_same_gradients(actual, expected)


def test_the_attnres_executor() -> None:
    converted = converted_tower(executor="attnres")
    eager = converted_tower()
    assert error(converted(X), tower_oracle(eager, X)) <= EXACT
    expected = gradients(eager, eager(X).square().sum())
    assert_same_gradients(gradients(converted, converted(X).square().sum()), expected)


def test_compiled_by_the_backend() -> None:
    converted = converted_llama()
    inputs = llama_inputs()
    expected = gradients(converted, converted(**inputs).logits.square().mean())
    compiled = torch.compile(converted, backend="attnres", fullgraph=True)
    logits = compiled(**inputs).logits
    assert error(logits.detach(), llama_oracle_logits(converted)) <= EXACT
    assert_same_gradients(gradients(converted, logits.square().mean()), expected)


def test_the_backend_warns_once_of_an_unconverted_model() -> None:
    model = tower()
    with pytest.warns(UserWarning, match=r"attnres_compile\.convert\(model\) adds them"):
        compiled = torch.compile(model, backend="attnres")(X)
    assert error(compiled, model(X)) <= EXACT


@pytest.mark.parametrize("decompose", [False, True])
def test_export(decompose: bool) -> None:
    converted = converted_tower()
    dynamic = {"x": {0: torch.export.Dim("batch")}}
    program = attnres_compile.export(converted, (X,), dynamic_shapes=dynamic, decompose=decompose)
    mixes = [n for n in program.graph.nodes if str(n.target).startswith("attnres.mix")]
    assert len(mixes) == (0 if decompose else 4)
    for batch in (6, 3):
        x = tower_inputs(batch)
        assert error(program.module()(x), tower_oracle(converted, x)) <= EXACT


class Flat(nn.Module):
    """Small enough for symbolic tracing."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.linears = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, linear in zip(self.norms, self.linears, strict=True):
            x = x + linear(norm(x))
        return x


def test_a_graph_module_stays_one() -> None:
    x = torch.randn(2, 4, 8)
    module = fx.symbolic_trace(Flat())
    converted: Any = attnres_compile.convert(module, (x,))
    assert isinstance(converted, fx.GraphModule)
    assert error(converted(x), module(x)) <= EXACT
    expected = attnres_compile.convert(_with_same_weights(module), (x,))
    for model in (converted, expected):
        randomize(model)
    assert error(converted(x), expected(x)) <= EXACT
    assert error(converted(x), module(x)) > 1e-2
    assert len(list(module.parameters())) == len(list(converted.parameters())) - 6


def test_an_exported_program_stays_one() -> None:
    x = torch.randn(2, 4, 8)
    program = torch.export.export(Flat(), (x,))
    converted: Any = attnres_compile.convert(program)
    assert isinstance(converted, torch.export.ExportedProgram)
    assert error(converted.module()(x), program.module()(x)) <= EXACT
    runnable = converted.module()
    randomize(runnable)
    assert error(runnable(x), program.module()(x)) > 1e-2


def _with_same_weights(module: nn.Module) -> nn.Module:
    model = Flat()
    model.load_state_dict(module.state_dict())
    return model


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Flat()
    converted = attnres_compile.convert(model, (torch.empty(2, 4, 8, device="meta"),))
    assert {p.device.type for p in converted.parameters()} == {"meta"}
    assert converted(torch.empty(2, 4, 8, device="meta")).shape == (2, 4, 8)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_recurrent_branches(kind: Any) -> None:
    class Recurrent(Flat):
        def __init__(self) -> None:
            super().__init__()
            self.cells = nn.ModuleList(kind(8, 8, batch_first=True) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for norm, cell in zip(self.norms, self.cells, strict=True):
                x = x + cell(norm(x))[0]
            return x

    model = Recurrent().double()
    inputs = torch.randn(2, 4, 8).double()
    converted = attnres_compile.convert(model, (inputs,))
    assert converted.plan.num_residual_additions == 3
    for x in (inputs, torch.randn(3, 7, 8).double()):
        assert error(converted(x), model(x)) < 1e-12
        wanted, got = (
            torch.autograd.grad(m(x).square().sum(), list(model.cells.parameters()))
            for m in (model, converted)
        )
        assert all(error(a, b) < 1e-10 for a, b in zip(got, wanted, strict=True))
