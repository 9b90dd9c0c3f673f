"""Whole models with delta sources: counts by hand, losslessness, forward passes by hand, tools."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attnres_compile
import oracle_deltas
from attnres_compile import AttnResConfig
from attnres_compile.capture import capture
from attnres_compile.errors import ConfigError, NothingToConvertError
from attnres_compile.planning import plan_of_capture
from conversions import randomize, sites_of
from oracle_mixer import Mixing
from tolerances import relative_error
from zoo_case import float_outputs, perturb, tokens
from zoo_conversion import assert_everything_learns, assert_lossless, new_names, run

WIDTH = 16
TOLERANCE = 1e-10


def small(config: Any, **options: Any) -> Any:
    sizes = {
        "vocab_size": 96,
        "hidden_size": WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 2 * WIDTH,
    }
    return config(**sizes, **options)


def make_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, batch_first=True)
    return nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(WIDTH))


def make_resnet(blocks: tuple[int, ...] = (4, 1, 3, 2)) -> nn.Module:
    """The stages have 3, 0, 2 and 1 blocks after the one that projects its skip."""
    bottleneck = torchvision.models.resnet.Bottleneck
    return torchvision.models.ResNet(bottleneck, list(blocks), num_classes=5, width_per_group=4)


@dataclass(frozen=True)
class Case:
    """A model and what is counted by hand in its source.

    Attributes:
        sublayers: of each stream, by its name.
        too_short: additions in streams of one sublayer, which are refused.
        oracle: its forward pass with delta sources; None for the plan alone.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    sublayers: dict[str, int]
    oracle: Callable[..., dict[str, Tensor]] | None
    too_short: int = 0

    def build(self) -> tuple[nn.Module, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = self.make().eval()
            perturb(model)
            inputs = self.inputs()
        return model.double(), inputs.double() if inputs.is_floating_point() else inputs

    def __str__(self) -> str:
        return self.name


def values() -> Tensor:
    return torch.randn(2, 5, WIDTH)


def pixels() -> Tensor:
    return torch.randn(2, 3, 32, 32)


SHARED = "encoder.albert_layer_groups.0.albert_layers.0"
CASES = [
    Case(
        "bert",
        lambda: transformers.BertModel(small(transformers.BertConfig)),
        tokens,
        {"encoder.layer": 6},
        oracle_deltas.bert,
    ),
    Case(
        "albert",
        lambda: transformers.AlbertModel(small(transformers.AlbertConfig, embedding_size=8)),
        tokens,
        {SHARED: 6},
        oracle_deltas.albert,
    ),
    Case("encoder", make_encoder, values, {"layers": 6}, oracle_deltas.transformer_encoder),
    Case(
        "resnet",
        make_resnet,
        pixels,
        {"layer1": 3, "layer3": 2},
        oracle_deltas.resnet,
        too_short=1,
    ),
    Case(
        "deep_norm",
        lambda: oracle_deltas.DeepNorm(WIDTH, 5),
        values,
        {"stream": 5},
        oracle_deltas.deep_norm,
    ),
    Case(
        "gated_skips",
        lambda: oracle_deltas.GatedSkips(WIDTH, 5),
        values,
        {"stream": 5},
        oracle_deltas.gated_skips,
    ),
    Case(
        "subtracted",
        lambda: oracle_deltas.Subtracted(WIDTH, 5),
        values,
        {"stream": 5},
        oracle_deltas.subtracted,
    ),
    Case(
        "lambdas",
        lambda: oracle_deltas.Lambdas(WIDTH, 3),
        values,
        {"stream": 6},
        oracle_deltas.lambdas,
    ),
]
PLANNED_ONLY: list[Any] = [
    Case(
        "roberta",
        lambda: transformers.RobertaModel(small(transformers.RobertaConfig)),
        tokens,
        {"encoder.layer": 6},
        None,
    ),
    Case(
        "transformer",
        lambda: nn.Transformer(WIDTH, 2, 2, 2, 2 * WIDTH, batch_first=True),
        values,
        {"encoder.layers": 4, "decoder.layers": 6},
        None,
    ),
    pytest.param(
        Case(
            "resnet50",
            torchvision.models.resnet50,
            pixels,
            {"layer1": 2, "layer2": 3, "layer3": 5, "layer4": 2},
            None,
        ),
        marks=pytest.mark.slow,
    ),
]


def with_slow(cases: list[Any], names: set[str]) -> list[Any]:
    """Cases by name behind the slow marker; the forward passes by hand take them all anyway."""
    return [pytest.param(c, marks=pytest.mark.slow) if str(c) in names else c for c in cases]


by_case = pytest.mark.parametrize("case", CASES, ids=str)
PLANS_ALIKE = {"resnet", "roberta", "transformer"}
CONFIG = AttnResConfig(block_sublayers=2, delta_sources=True)


def arguments(case: Case, inputs: Tensor) -> tuple[Any, ...]:
    return (inputs, inputs) if case.name == "transformer" else (inputs,)


@pytest.mark.parametrize("case", with_slow([*CASES, *PLANNED_ONLY], PLANS_ALIKE), ids=str)
def test_counts_and_both_routes(case: Case) -> None:
    """A site at every depth; one less query than sites in every stream; by both routes alike."""
    model, inputs = case.build()
    args = arguments(case, inputs)
    plan = attnres_compile.plan(model, args, config=CONFIG)
    assert {s.name: len(s.sublayers) for s in plan.streams} == case.sublayers
    assert all(stream.deltas for stream in plan.streams)
    assert [r.kind for r in plan.refusals] == ["single-sublayer"] * case.too_short
    for stream in plan.streams:
        assert [site.depth for site in stream.sites] == list(range(len(stream.sublayers) + 1))
        assert [site.num_sources for site in stream.sites] == [
            1 + (depth + 1) // 2 for depth in range(len(stream.sublayers) + 1)
        ]
    exported = plan_of_capture(capture(model, args, route="export"), model, CONFIG)
    assert shape_of_plan(exported) == shape_of_plan(plan)


def shape_of_plan(plan: Any) -> Any:
    return [
        (s.name, s.owner, s.deltas, s.channel_dim, [(site.depth, site.state) for site in s.sites])
        for s in plan.streams
    ]


@pytest.mark.parametrize("case", with_slow([*CASES, *PLANNED_ONLY], PLANS_ALIKE), ids=str)
def test_off_by_default_and_offered(case: Case) -> None:
    model, inputs = case.build()
    plan = attnres_compile.plan(model, arguments(case, inputs))
    offered = [r for r in plan.refusals if "AttnResConfig(delta_sources=True)" in r.reason]
    converted_anyway = {s.name: len(s.sublayers) for s in plan.streams}
    if case.name == "lambdas":  # each layer alone is a plain stream, of two sublayers
        assert converted_anyway == {"stream": 2, "stream#2": 2, "stream#3": 2}
        return
    assert not converted_anyway
    assert len(offered) == sum(case.sublayers.values())
    with pytest.raises(NothingToConvertError, match=r"AttnResConfig\(delta_sources=True\)"):
        plan.require_streams()


@pytest.mark.parametrize("case", with_slow(CASES, {"resnet", "bert"}), ids=str)
def test_lossless_and_stripped(case: Case) -> None:
    """Outputs and gradients at zero queries; then with random ones everything learns."""
    model, inputs = case.build()
    original = copy.deepcopy(model)
    converted = attnres_compile.convert(model, (inputs,), config=CONFIG)
    expected = run(original, ((inputs,), {}))
    assert_lossless(run(converted, ((inputs,), {})), expected, TOLERANCE)
    stripped = attnres_compile.strip(converted)
    assert type(stripped) is type(original)
    assert all(torch.equal(a, original.state_dict()[n]) for n, a in stripped.state_dict().items())
    randomize(converted)
    plan: Any = converted.plan
    assert_everything_learns(run(converted, ((inputs,), {})), expected, new_names(plan))


@by_case
@pytest.mark.parametrize(
    ("aggregate", "block_sublayers"),
    [
        pytest.param("sum", 2, id="sum-2"),
        *(
            pytest.param(aggregate, size, id=f"{aggregate}-{size}", marks=pytest.mark.slow)
            for aggregate, size in (("sum", 1), ("sum", 4), ("mean", 1), ("mean", 2), ("mean", 4))
        ),
    ],
)
def test_random_queries_equal_the_forward_pass_by_hand(
    case: Case, aggregate: Any, block_sublayers: int
) -> None:
    compare(case, aggregate, block_sublayers)


def test_sites_that_are_left_out_read_the_state() -> None:
    """In BERT attention reads at even depths; 3 layers, so depths 2 and 4 (0 is the root)."""
    left_out = frozenset(("encoder.layer", depth) for depth in (1, 3, 5, 6))
    compare(CASES[0], "sum", 2, sites=("*.attention",), left_out=left_out)


def compare(
    case: Case,
    aggregate: Any,
    block_sublayers: int,
    *,
    sites: tuple[str, ...] | None = None,
    left_out: frozenset[tuple[str, int]] = frozenset(),
) -> None:
    """Outputs, gradients of all weights, and of all queries and gains."""
    model, inputs = case.build()
    options: Any = {"aggregate": aggregate, "block_sublayers": block_sublayers}
    config = AttnResConfig(delta_sources=True, sites=sites, **options)
    converted: Any = attnres_compile.convert(copy.deepcopy(model), (inputs,), config=config)
    randomize(converted)
    mixes = sites_of(converted)
    for site in mixes.values():
        site.query.requires_grad_()
        site.gain.requires_grad_()
    assert case.oracle is not None
    mixing = Mixing(mixes, left_out=left_out, **options)
    expected = list(case.oracle(model, mixing, inputs).values())
    found = float_outputs(converted(inputs))
    assert len(found) == len(expected)
    for actual, by_hand in zip(found, expected, strict=True):
        assert relative_error(actual, by_hand) <= TOLERANCE
    loss(found).backward()
    loss(expected).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert_same_gradient(converted.get_parameter(name).grad, parameter.grad, name)
    for stream in converted.plan.streams:
        assert {(stream.name, s.depth) for s in stream.sites if s.left_out} == left_out
        for planned in (site for site in stream.sites if site.query_name):
            site = mixes[stream.name, planned.depth]
            for name, value in ((planned.query_name, site.query), (planned.gain_name, site.gain)):
                assert_same_gradient(converted.get_parameter(name).grad, value.grad, name)


def loss(outputs: list[Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    terms = [(o * torch.randn(o.shape, generator=generator)).sum() for o in outputs]
    return torch.stack(terms).sum()


def assert_same_gradient(actual: Tensor | None, expected: Tensor | None, name: str) -> None:
    assert actual is not None, name
    assert expected is not None, name
    scale = max(expected.abs().max().item(), 1e-3)
    assert (actual - expected).abs().max().item() <= 100 * TOLERANCE * scale, name


def test_a_branch_that_reads_the_state_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative twin of the comparison: an oracle that reads one site less does not pass."""
    read = oracle_deltas.DeltaMixer.read

    def one_plain(self: Any) -> Tensor:
        return self.state if len(self._states) == 3 else read(self)

    monkeypatch.setattr(oracle_deltas.DeltaMixer, "read", one_plain)
    with pytest.raises(AssertionError):
        compare(CASES[2], "sum", 2)


def test_a_carrier_that_takes_the_mix_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    state = property(oracle_deltas.DeltaMixer.read)
    monkeypatch.setattr(oracle_deltas.DeltaMixer, "state", state)
    monkeypatch.setattr(
        oracle_deltas.DeltaMixer, "read", lambda self: self.state if len(self._states) > 1 else 0
    )
    with pytest.raises((AssertionError, RecursionError)):
        compare(CASES[2], "sum", 2)


def rounding_error(size: float) -> float:
    """In float32, of a converted DeepNorm whose root is so many times as large as its states."""
    model, inputs = next(case for case in CASES if case.name == "deep_norm").build()
    exact = model(inputs * size)
    inputs = (inputs * size).float()
    converted = attnres_compile.convert(model.float(), (inputs,), config=CONFIG)
    return relative_error(converted(inputs).double(), exact)


def test_a_large_root_costs_digits() -> None:
    """As documented: differences are rounded at the size of the root."""
    assert rounding_error(1) < 2e-6
    assert 1e-5 < rounding_error(1e4) < 4e-3


# Tools.


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
