"""The oracles are right about everything but the package, which they have never heard of.

With zero queries and the sum an oracle must be the original model: that checks its branches. The
formula and the block layout are checked on numbers worked out by hand.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from oracle_cases import (
    CASES,
    OracleCase,
    gradient_of,
    loss_of,
    output_error,
    random_sites,
    run_oracle,
)
from oracle_mixer import (
    Aggregate,
    BlockMixer,
    Mixing,
    OracleStream,
    Read,
    SiteKey,
    SiteParameters,
    mix,
)

Layout = dict[str, Any]

LLAMA = CASES[0]
RESNET = CASES[-1]
LAYOUTS = [
    pytest.param({"num_blocks": 1}, id="1"),
    pytest.param({"num_blocks": 3}, id="3"),
    pytest.param({"num_blocks": 8}, id="8"),
    pytest.param({"block_sublayers": 1}, id="full"),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


# The layout and the formula


@pytest.mark.parametrize(
    ("layers", "per_layer", "layout", "sizes"),
    [
        (6, 2, {"num_blocks": 1}, [12]),
        (6, 2, {"num_blocks": 3}, [4, 4, 4]),
        (5, 2, {"num_blocks": 3}, [2, 2, 6]),  # whole layers: 1, 1 and 3 of them
        (6, 2, {"num_blocks": 8}, [1, 1, 1, 1, 1, 1, 1, 5]),  # fewer layers than blocks
        (10, 2, {"num_blocks": 8}, [2, 2, 2, 2, 2, 2, 2, 6]),
        (6, 3, {"num_blocks": 4}, [3, 3, 3, 9]),
        (3, 3, {"num_blocks": 4}, [2, 2, 2, 3]),
        (3, 1, {"num_blocks": 8}, [1, 1, 1]),  # clipped to the sublayers
        (3, 2, {"num_blocks": "auto"}, [1] * 6),
        (16, 2, {"num_blocks": "auto"}, [4] * 8),
        (3, 2, {"block_sublayers": 1}, [1] * 6),
        (3, 2, {"block_sublayers": 4}, [4, 2]),
    ],
)
def test_block_layout_by_hand(
    layers: int, per_layer: int, layout: Layout, sizes: list[int]
) -> None:
    stream = OracleStream("layers", channels=4, layers=layers, sublayers_per_layer=per_layer)

    assert Mixing({}, **layout).block_sizes(stream) == sizes


@pytest.mark.parametrize(
    ("eps", "first_score", "second_score"),
    [
        # keys (1, 7) / 5 and (1, -1) / 1
        (1e-15, 2 * 0.2 + 1 * 1.4, 2 * 1 + 1 * -1),
        # keys (1, 7) / 7 and (1, -1) / 5: eps joins the mean square under the root
        (24.0, 2 / 7 + 1, 2 / 5 - 1 / 5),
    ],
)
def test_mix_of_two_sources_by_hand(eps: float, first_score: float, second_score: float) -> None:
    first = torch.tensor([[1.0, 7.0]], dtype=torch.float64)  # mean square 25
    second = torch.tensor([[1.0, -1.0]], dtype=torch.float64)  # mean square 1
    query = torch.tensor([2.0, 0.5], dtype=torch.float64)
    gain = torch.tensor([1.0, 2.0], dtype=torch.float64)  # query * gain is (2, 1)

    alpha = math.exp(first_score) / (math.exp(first_score) + math.exp(second_score))
    expected = alpha * first + (1 - alpha) * second  # the values are not normed

    for aggregate, factor in (("mean", 1), ("sum", 2)):
        mixed = mix([first, second], SiteParameters(query, gain), aggregate=aggregate, eps=eps)
        torch.testing.assert_close(mixed, factor * expected)


def test_query_selects_the_source_it_points_at() -> None:
    sources = list(torch.randn(4, 2, 16, generator=torch.Generator().manual_seed(0)).double())
    sources = [source[:1] for source in sources]
    site = SiteParameters(1e4 * sources[2][0], torch.ones(16).double())

    mixed = mix(sources, site, aggregate="mean", eps=1e-6)

    torch.testing.assert_close(mixed, sources[2])


def test_channel_dimension_is_the_one_that_is_mixed_over() -> None:
    sources = list(torch.randn(3, 2, 6, 4, 4, generator=torch.Generator().manual_seed(0)))
    site = random_sites([OracleStream("s", 6, 1, 1)], dtype=torch.float32)["s", 1]

    channels_first = mix(sources, site, aggregate="sum", eps=1e-6, channel_dim=1)
    tokens_last = [source.permute(0, 2, 3, 1) for source in sources]
    channels_last = mix(tokens_last, site, aggregate="sum", eps=1e-6)

    torch.testing.assert_close(channels_first, channels_last.permute(0, 3, 1, 2))


def test_sources_of_each_read() -> None:
    """Two blocks of two sublayers: a block's first site sees no partial sum, the others do."""
    stream = OracleStream("s", channels=1, layers=4, sublayers_per_layer=1)
    reads: dict[SiteKey, Read] = {}
    mixer = BlockMixer(stream, value(1), Mixing(random_sites([stream]), num_blocks=2), reads)
    for branch in (10, 100, 1000, 10000):
        mixer.read()
        mixer.add(value(branch))
    mixer.read()

    assert sources_of(reads) == [
        [1],
        [1, 10],
        [1, 110],
        [1, 110, 1000],
        [1, 110, 11000],
    ]


def test_two_additions_without_a_read_between_are_one_sublayer() -> None:
    """So a parallel residual may be spelled x + (a + b) or (x + a) + b; depth still counts two."""
    stream = OracleStream("s", channels=1, layers=2, sublayers_per_layer=1)
    reads: dict[SiteKey, Read] = {}
    sites = random_sites([OracleStream("s", 1, 4, 1)])
    mixer = BlockMixer(stream, value(1), Mixing(sites, block_sublayers=1), reads)
    for attention, feed_forward in ((10, 20), (300, 400)):
        mixer.read()
        mixer.add(value(attention))
        mixer.add(value(feed_forward))
    mixer.read()

    assert [depth for _, depth in reads] == [0, 2, 4]
    assert sources_of(reads) == [[1], [1, 30], [1, 30, 700]]


def value(number: float) -> Tensor:
    return torch.tensor([[number]], dtype=torch.float64)


def sources_of(reads: dict[SiteKey, Read]) -> list[list[float]]:
    return [[source.item() for source in read.sources] for read in reads.values()]


# The five oracles


@every_case
@pytest.mark.parametrize("layout", LAYOUTS)
def test_zero_queries_with_sum_are_the_original_model(case: OracleCase, layout: Layout) -> None:
    model = case.build()
    sites = random_sites(case.streams(model), "zero")

    result = run_oracle(case, model, Mixing(sites, aggregate="sum", **layout))

    expected = case.run(model)
    assert result.outputs.keys() == expected.keys()
    for name, tensor in expected.items():
        assert output_error(result.outputs[name], tensor) < 1e-10, name


@every_case
def test_gradients_at_zero_queries_are_those_of_the_original_model(case: OracleCase) -> None:
    model, oracle_model = case.build(), case.build()
    sites = random_sites(case.streams(model), "zero")

    loss_of(case.run(model)).backward()
    loss_of(run_oracle(case, oracle_model, Mixing(sites, num_blocks=3)).outputs).backward()

    gradients = {name: gradient_of(tensor) for name, tensor in model.named_parameters()}
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, expected in gradients.items():
        difference = (gradient_of(oracle_model.get_parameter(name)) - expected).abs().max().item()
        assert difference <= 1e-10 * max(expected.abs().max().item(), 1e-3 * largest), name
    # a gain acts through the product with its query, so only the queries move at first
    for key, site in sites.items():
        assert gradient_of(site.query).abs().max() > 0, key
        assert gradient_of(site.gain).abs().max() == 0, key


@every_case
def test_every_site_and_every_weight_has_a_gradient(case: OracleCase) -> None:
    """A site that the oracle forgot to read, or a branch that it skipped, would show here."""
    model = case.build()
    sites = random_sites(case.streams(model))

    loss_of(run_oracle(case, model, Mixing(sites, num_blocks=3)).outputs).backward()

    for key, site in sites.items():
        assert gradient_of(site.query).abs().max() > 0, key
        assert gradient_of(site.gain).abs().max() > 0, key
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


def test_zero_queries_with_mean_are_llama_up_to_the_norms_eps() -> None:
    model = LLAMA.build()
    mixing = Mixing(random_sites(LLAMA.streams(model), "zero"), aggregate="mean")

    def error_with(norm_eps: float) -> float:
        for module in model.modules():
            if isinstance(module, LlamaRMSNorm):
                module.variance_epsilon = norm_eps
        expected = LLAMA.run(model)["logits"]
        return output_error(run_oracle(LLAMA, model, mixing).outputs["logits"], expected)

    # transformers' RMSNorm computes in float32 whatever its input is
    assert error_with(1e-12) < 1e-5
    assert error_with(1e-1) > 1e-3


def test_zero_queries_with_mean_are_not_a_resnet() -> None:
    """Batch norm divides by stored statistics: it sees the factor that the mean takes away."""
    model = RESNET.build()
    mixing = Mixing(random_sites(RESNET.streams(model), "zero"), aggregate="mean")

    result = run_oracle(RESNET, model, mixing)

    assert output_error(result.outputs["logits"], RESNET.run(model)["logits"]) > 1e-2


@every_case
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sources_sum_to_the_residual_stream_of_the_original(
    case: OracleCase, layout: Layout
) -> None:
    """What the original model's norms read, watched from outside, is the sum of the sources."""
    model = case.build()
    sites = random_sites(case.streams(model), "zero")
    seen: dict[SiteKey, Tensor] = {}
    for key, path in case.readers().items():
        watch_input(model.get_submodule(path), key, seen)
    case.run(model)
    states = dict(seen)  # the oracle runs the same norms, and would overwrite them

    reads = run_oracle(case, model, Mixing(sites, **layout)).reads

    assert reads.keys() == states.keys()
    for key, state in states.items():
        assert output_error(torch.stack(reads[key].sources).sum(0), state) < 1e-10, key


@every_case
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sources_partition_the_sum_of_branches(case: OracleCase, layout: Layout) -> None:
    """With random queries the branches change, but each is still counted exactly once."""
    model = case.build()
    sites = random_sites(case.streams(model))

    reads = run_oracle(case, model, Mixing(sites, **layout)).reads

    assert reads.keys() == case.readers().keys()
    for key, read in reads.items():
        assert output_error(torch.stack(read.sources).sum(0), read.ordinary_sum) < 1e-12, key
        assert (len(read.sources) == 1) == (key not in sites), key


@every_case
@pytest.mark.parametrize("aggregate", ["sum", "mean"])
def test_random_queries_change_the_model(case: OracleCase, aggregate: Aggregate) -> None:
    """The negative twin: every layout gives another function, none of them the original's."""
    model = case.build()
    sites = random_sites(case.streams(model))
    outputs = [case.run(model)["logits"]]
    for layout in ({"num_blocks": 1}, {"num_blocks": 3}, {"num_blocks": 8}):
        mixing = Mixing(sites, aggregate=aggregate, **layout)
        outputs.append(run_oracle(case, model, mixing).outputs["logits"])

    for index, first in enumerate(outputs):
        for second in outputs[:index]:
            assert output_error(first, second) > 1e-2


@every_case
@pytest.mark.parametrize("aggregate", ["sum", "mean"])
def test_float32_is_well_conditioned(case: OracleCase, aggregate: Aggregate) -> None:
    """Rounding alone stays well below 1e-5, the tolerance of the comparisons in float32."""
    double = case.build()
    single = copy.deepcopy(double).float()
    outputs = {}
    for dtype, model in ((torch.float64, double), (torch.float32, single)):
        sites = random_sites(case.streams(model), dtype=dtype)
        mixing = Mixing(sites, block_sublayers=1, aggregate=aggregate)
        outputs[dtype] = run_oracle(case, model, mixing, dtype).outputs["logits"]

    assert outputs[torch.float32].dtype == torch.float32
    assert output_error(outputs[torch.float32].double(), outputs[torch.float64]) < 5e-6


def watch_input(module: nn.Module, key: SiteKey, seen: dict[SiteKey, Tensor]) -> None:
    def remember(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[key] = args[0].detach()

    module.register_forward_pre_hook(remember)
