"""One model, captured in many ways: the residual streams and sites that are found are the same."""

from __future__ import annotations

import copy
import functools
import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import attnres_compile
from attnres_compile import execution
from attnres_compile.capture import Captured, annotate_symbolic, capture
from attnres_compile.config import AttnResConfig
from attnres_compile.errors import CaptureError
from attnres_compile.planning import plan_of_capture
from attnres_compile.plans import ConversionPlan
from attnres_compile.rewriting import rewrite_dynamo_graph
from tolerances import relative_error
from zoo import by_name
from zoo_conversion import assert_lossless, is_new, new_names, randomize, run, sites_of

Change = Callable[[nn.Module, dict[str, Any]], None]


def additions_of(plan: ConversionPlan) -> list[Any]:
    """Identities of the additions, and where they are read: all that a graph alone can tell."""
    return [
        (
            [(a.module_path, a.ordinal) for a in stream.additions],
            [(site.depth, site.num_sources) for site in stream.sites],
        )
        for stream in plan.streams
    ]


# Routes.


@pytest.mark.parametrize("name", ["preact_resnet", "torchvision_mobilenet_v2"])
def test_a_traced_and_an_exported_graph_have_the_sites_of_the_model(name: str) -> None:
    case = by_name(name)
    model = case.build()
    args, _ = case.inputs()
    expected = run(model, (args, {}))
    planned = attnres_compile.plan(model, args)
    traced: Any = attnres_compile.convert(fx.symbolic_trace(model), args)
    exported: Any = attnres_compile.convert(torch.export.export(model, args))  # type: ignore[type-var]
    assert additions_of(traced.plan) == additions_of(planned)
    assert_lossless(run(traced, (args, {})), expected, 1e-5)
    outputs = exported.module()(*args)
    assert relative_error(outputs, expected.outputs[0]) < 1e-5


def test_a_graph_without_module_calls_counts_its_additions_from_the_root() -> None:
    case = by_name("preact_resnet")
    model = case.build()
    args, _ = case.inputs()
    exported = torch.export.export(model, args).run_decompositions()
    for node in exported.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    annotate_symbolic(exported.graph_module)
    captured = Captured(exported.graph_module, "graph")
    plan = plan_of_capture(captured, model, AttnResConfig(), owner="")
    ordinals = [[addition.ordinal for addition in stream.additions] for stream in plan.streams]
    assert ordinals == [[0, 1, 2], [3, 4]]
    assert {addition.module_path for s in plan.streams for addition in s.additions} == {""}


def test_decompositions_change_no_site() -> None:
    case = by_name("llama")
    model = case.build()
    args, kwargs = case.inputs()
    planned = attnres_compile.plan(model, args, kwargs)
    exported = torch.export.export(model, args, kwargs, strict=False).run_decompositions()
    converted = attnres_compile.convert(exported)
    added = {name for name in converted.state_dict if is_new(name)}
    assert len(added) == len(new_names(planned))
    expected = model(**kwargs).logits
    assert relative_error(converted.module()(**kwargs).logits, expected) < 1e-5


# Ways to call a model.


def in_training(model: nn.Module, inputs: dict[str, Any]) -> None:
    model.train()


def with_labels(model: nn.Module, inputs: dict[str, Any]) -> None:
    inputs["labels"] = inputs["input_ids"]


def with_cache(model: nn.Module, inputs: dict[str, Any]) -> None:
    inputs["use_cache"] = True


def with_padding(model: nn.Module, inputs: dict[str, Any]) -> None:
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :3] = 0
    inputs["attention_mask"] = mask


def with_embeddings(model: nn.Module, inputs: dict[str, Any]) -> None:
    ids = inputs.pop("input_ids")
    inputs["inputs_embeds"] = model.get_input_embeddings()(ids).detach()  # type: ignore[operator]


def with_one_token(model: nn.Module, inputs: dict[str, Any]) -> None:
    inputs["input_ids"] = inputs["input_ids"][:1, :1]


def with_checkpointing(model: nn.Module, inputs: dict[str, Any]) -> None:
    model.train()
    model.gradient_checkpointing_enable()  # type: ignore[operator]


def on_no_device(model: nn.Module, inputs: dict[str, Any]) -> None:
    model.to("meta")
    inputs["input_ids"] = inputs["input_ids"].to("meta")


def in_bfloat16(model: nn.Module, inputs: dict[str, Any]) -> None:
    model.bfloat16()


@functools.cache
def sites_of_llama() -> list[Any]:
    args, kwargs = by_name("llama").inputs()
    return sites_of(attnres_compile.plan(by_name("llama").build(), args, kwargs))


@pytest.mark.parametrize(
    "change",
    [
        in_training,
        with_labels,
        with_cache,
        with_padding,
        with_embeddings,
        with_one_token,
        with_checkpointing,
        on_no_device,
        in_bfloat16,
    ],
)
def test_a_language_model_has_the_same_sites_however_it_is_called(change: Change) -> None:
    expected = sites_of_llama()
    model, (_, inputs) = by_name("llama").build(), by_name("llama").inputs()
    change(model, inputs)
    plan = attnres_compile.plan(model, (), inputs)
    if change is with_embeddings:  # then the root is an input
        expected = [(*stream[:2], "the input", *stream[3:]) for stream in expected]
    assert sites_of(plan) == expected
    assert not plan.refusals


def test_planning_without_gradients_or_under_autocast_changes_nothing() -> None:
    case = by_name("nn_transformer_encoder")
    model = case.build()  # in eval mode and without gradients it takes a fused path of its own
    args, _ = case.inputs()
    expected = sites_of(attnres_compile.plan(model, args))
    assert expected
    fused = torch.backends.mha.get_fastpath_enabled()
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu")):
        with context:
            assert sites_of(attnres_compile.plan(model, args)) == expected
    assert torch.backends.mha.get_fastpath_enabled() == fused


# Sizes: a capture does not depend on what was captured before.


class Step(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x))


class Stage(nn.Module):
    def __init__(self, width: int, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Step(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Stages(nn.Module):
    """Two owners of one class and of different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down, self.second = Stage(8), nn.Linear(8, 6), Stage(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.down(self.first(x))[:, ::2])


def has_symbolic_sizes(module: fx.GraphModule) -> bool:
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    return any(isinstance(node.meta["example_value"], torch.SymInt) for node in inputs)


def test_a_capture_does_not_depend_on_the_captures_before_it() -> None:
    for length in (4, 7, 9):
        captured = capture(Stage(8), (torch.randn(2, length, 8),))
        assert not has_symbolic_sizes(captured.module)


def test_owners_of_one_class_do_not_make_each_others_sizes_symbolic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    symbolic: list[bool] = []

    def watched(module: fx.GraphModule, owner: Any) -> int:
        symbolic.append(has_symbolic_sizes(module))
        return rewrite_dynamo_graph(module, owner)

    monkeypatch.setattr(execution, "rewrite_dynamo_graph", watched)
    x = torch.randn(2, 4, 8)
    converted = attnres_compile.convert(Stages(), (x,))
    converted(x)
    assert symbolic == [False, False]
    converted(torch.randn(2, 10, 8))  # the negative twin: now they have changed indeed
    assert symbolic == [False, False, True, True]


# What reads a shape does not read the stream.


class ShapeReader(nn.Module):
    """Parallel branches, and between their additions questions about the state."""

    def __init__(self, *, asks: bool, in_place: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.left = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.right = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.asks, self.in_place = asks, in_place

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for norm, left, right in zip(self.norms, self.left, self.right, strict=True):
            normed = norm(x)
            x = self.add(x, left(normed))
            if self.asks:
                zeros = torch.zeros_like(x.double()).float() + torch.ones(x.shape[1], 1)
                normed = normed + zeros - 1
            x = self.add(x, right(normed))
        return self.norms[0](x)

    def add(self, x: Tensor, branch: Tensor) -> Tensor:
        if self.in_place:
            x += branch
            return x
        return x + branch


@pytest.mark.parametrize("in_place", [False, True])
def test_asking_a_state_for_its_shape_is_no_read(in_place: bool) -> None:
    asking = ShapeReader(asks=True, in_place=in_place)
    silent = ShapeReader(asks=False, in_place=in_place)
    silent.load_state_dict(asking.state_dict())
    x = torch.randn(2, 4, 8)
    converted: list[Any] = [attnres_compile.convert(m, (x,)) for m in (asking, silent)]
    for model in converted:
        assert [len(stream.sublayers) for stream in model.plan.streams] == [3]
        assert model.plan.num_residual_additions == 6
        randomize(model)
    for batch, length in ((2, 4), (3, 5), (4, 6)):  # the sizes become symbolic
        x = torch.randn(batch, length, 8)
        with torch.no_grad():
            assert relative_error(converted[0](x), converted[1](x)) < 1e-6
            assert relative_error(converted[0](x), asking(x)) > 1e-3


# Traps of capturing.


LOGGER = logging.getLogger("a model's")


class Talkative(Stage):
    def forward(self, x: Tensor) -> Tensor:
        LOGGER.warning("the first call of many")
        return super().forward(x)


@pytest.mark.parametrize("route", ["dynamo", "export"])
def test_loggers_break_no_graph(route: Any) -> None:
    model = Talkative(8)
    captured = capture(model, (torch.randn(2, 4, 8),), route=route)
    (stream,) = plan_of_capture(captured, model, AttnResConfig()).streams
    assert len(stream.additions) == 2


def test_a_capture_executes_nothing() -> None:
    class Counting(Stage):
        def __init__(self) -> None:
            super().__init__(8)
            self.register_buffer("calls", torch.zeros(()))
            self.calls: Tensor

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    model = Counting()
    state = copy.deepcopy(model.state_dict())
    attnres_compile.convert(model, (torch.randn(2, 4, 8),))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


class Branching(Stage):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = -x
        return super().forward(x)


@pytest.mark.parametrize("route", ["dynamo", "export"])
def test_a_model_that_cannot_be_captured_says_where_and_what_to_do(route: Any) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Branching(8), (torch.randn(2, 4, 8),), route=route)
    message = str(caught.value)
    assert message.startswith("Branching could not be captured as one graph")
    assert "Ways forward:" in message
    if route == "dynamo":
        assert "test_capture_routes.py:" in message
    assert "\n" not in message


CAUSES = {
    r"at test_capture_routes\.py:\d+ \(in <lambda>\): TypeError: .*": lambda m, x: m.norm(x, 1, 2),
    r"AttributeError: .* has no attribute 'nothing'\. ": lambda m, x: m.nothing(x),
    r"RuntimeError: Given normalized_shape=\[8\], expected .*\(\[2, 4, 7\]\)": lambda m, x: m.norm(
        x[..., :7]
    ),
    r"marked as skipped: Dynamo does not know how to trace the builtin `time.sleep": lambda m, x: (
        time.sleep(0)
    ),
    r"Data-dependent branching: Detected .*does not support": lambda m, x: x if x.sum() > 0 else -x,
}


@pytest.mark.parametrize("cause", CAUSES)
def test_it_says_what_the_code_itself_raised(cause: str) -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Any:
            return CAUSES[cause](self, x)

    with pytest.raises(CaptureError, match=cause) as caught:
        capture(Failing(), (torch.randn(2, 4, 8),))
    assert "\n" not in str(caught.value)
