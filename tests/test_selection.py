"""Choosing streams, sites and blocks: by hand counts, and against the forward written by hand."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import attnres_compile
from attnres_compile import AttnResConfig
from attnres_compile.capture import Captured, capture
from attnres_compile.checkpoint.record import as_toml
from attnres_compile.cli_options import read_config
from attnres_compile.errors import ConfigError, NothingToConvertError
from attnres_compile.planning import plan_of_capture
from attnres_compile.plans import ConversionPlan
from attnres_compile.spine_drawing import as_dot
from conversions import tower, tower_inputs
from oracle_cases import CASES, OracleCase, gradient_of, loss_of, random_sites, run_oracle
from oracle_mixer import Mixing, SiteKey

LLAMA, _, _, T5, RESNET = CASES
LLAMA_NAME = "model.layers"


def chosen(planned: ConversionPlan) -> set[SiteKey]:
    return {(s.name, site.depth) for s in planned.streams for site in s.sites if site.query_name}


@functools.cache
def captured(case: OracleCase) -> tuple[Captured, nn.Module]:
    """A capture takes seconds, and planning does not change it."""
    model = case.build(torch.float64)
    return capture(model, *case.arguments()), model


def planned(case: OracleCase, **options: Any) -> ConversionPlan:
    return plan_of_capture(*captured(case), AttnResConfig(**options))


# Llama of 5 layers: depths 0 to 10; even ones are read by attention, odd ones by the MLP, depth 10
# by the final norm; depth 0 is the root and has no query.
@pytest.mark.parametrize(
    ("sites", "depths"),
    [
        (("*.self_attn",), {2, 4, 6, 8}),
        (("*.input_layernorm",), {2, 4, 6, 8}),
        (("!*.mlp",), {2, 4, 6, 8, 10}),
        (("model.norm",), {10}),
        (("model.layers[::2]",), {1, 4, 5, 8, 9}),
        (("model.layers[1::2].mlp", "model.norm"), {3, 7, 10}),
        (("model.layers[-1:]",), {8, 9}),
        (("model", "!model.layers.[0-3]"), {8, 9, 10}),
        (("*",), set(range(1, 11))),
    ],
)
def test_which_sites_are_chosen(sites: tuple[str, ...], depths: set[int]) -> None:
    found = planned(LLAMA, sites=sites)
    assert chosen(found) == {(LLAMA_NAME, depth) for depth in depths}
    (stream,) = found.streams
    assert [site.depth for site in stream.sites] == list(range(11))
    assert {s.depth for s in stream.sites if s.left_out} == set(range(1, 11)) - depths
    assert found.num_parameters == 2 * stream.width * len(depths)
    everything = planned(LLAMA)
    assert stream.blocks == everything.streams[0].blocks
    for site, same in zip(stream.sites, everything.streams[0].sites, strict=True):
        assert site.num_sources == (1 if site.left_out else same.num_sources)


# T5: an encoder of 8 sublayers and a decoder of 9, of which every third is cross-attention.
def test_not_the_encoder() -> None:
    found = planned(T5, sites=("!encoder",))
    assert [stream.name for stream in found.streams] == ["decoder.block"]
    assert chosen(found) == {("decoder.block", depth) for depth in range(1, 10)}
    left_out = [r for r in found.refusals if r.kind == "left-out"]
    assert len(left_out) == 8
    assert {r.reason for r in left_out} == {"left out by the option sites"}


def test_cross_attention_only() -> None:
    found = planned(T5, sites=("*.EncDecAttention",))
    assert chosen(found) == {("decoder.block", depth) for depth in (1, 4, 7)}


def compare_with_oracle(
    case: OracleCase, depths: dict[str, set[int]], **options: Any
) -> tuple[nn.Module, nn.Module]:
    """Random queries at the chosen sites, the plain sum at all others: outputs and gradients."""
    model = case.build(torch.float64)
    args, kwargs = case.arguments()
    config = AttnResConfig(**options)
    converted = attnres_compile.convert(copy.deepcopy(model), args, kwargs, config=config)
    sites = random_sites(case.streams(model))
    kept = {key: pair for key, pair in sites.items() if key[1] in depths.get(key[0], ())}
    parameters = dict(converted.named_parameters())
    names: dict[SiteKey, tuple[str, str]] = {}
    for stream in cast(Any, converted).plan.streams:
        for site in stream.sites:
            if site.query_name is not None:
                names[stream.name, site.depth] = (site.query_name, site.gain_name)
    assert names.keys() == kept.keys()
    with torch.no_grad():
        for key, pair in kept.items():
            for name, value in zip(names[key], pair, strict=True):
                parameters[name].copy_(value)
    options.pop("sites")
    options.pop("streams", None)
    mixing = Mixing(kept, left_out=frozenset(sites.keys() - kept.keys()), **options)
    expected = run_oracle(case, model, mixing).outputs
    outputs = case.run(converted)
    for name, value in expected.items():
        torch.testing.assert_close(outputs[name], value, rtol=1e-10, atol=1e-10, msg=name)
    loss_of(expected).backward()
    loss_of(outputs).backward()
    for key, pair in kept.items():
        for name, tensor in zip(names[key], pair, strict=True):
            torch.testing.assert_close(parameters[name].grad, gradient_of(tensor))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameters[name].grad, parameter.grad, rtol=1e-8, atol=1e-10)
    return model, converted


@pytest.mark.parametrize("aggregate", [pytest.param("sum", marks=pytest.mark.slow), "mean"])
def test_attention_only_equals_the_oracle(aggregate: str) -> None:
    depths = {LLAMA_NAME: {2, 4, 6, 8}}
    compare_with_oracle(LLAMA, depths, sites=("*.self_attn",), num_blocks=3, aggregate=aggregate)


def test_an_encoder_and_a_decoder_equal_the_oracle() -> None:
    depths = {"encoder.block": {4, 5, 8}, "decoder.block": {6, 7, 8, 9}}
    sites = ("*.block[2::2]", "*.final_layer_norm")
    compare_with_oracle(T5, depths, sites=sites, num_blocks=3)


@pytest.mark.slow
def test_channels_first_equals_the_oracle() -> None:
    """The last site of each stage, read by the next, and every second block of the first."""
    depths = {"stages.0": {2, 4, 6, 8}, "stages.1": {3}}
    compare_with_oracle(RESNET, depths, sites=("stages.0[::2]", "stages.2"), num_blocks=3)


@pytest.mark.parametrize("executor", ["eager", pytest.param("attnres", marks=pytest.mark.slow)])
def test_a_left_out_site_reads_what_it_did_before(executor: Any) -> None:
    """Bit for bit: before the first mix, the stream is the unconverted one."""
    model = LLAMA.build(torch.float32)
    args, kwargs = LLAMA.arguments(torch.float32)
    converted = attnres_compile.convert(
        copy.deepcopy(model),
        args,
        kwargs,
        config=AttnResConfig(sites=("model.norm",)),
        executor=executor,
    )
    seen: dict[str, list[Tensor]] = {"plain": [], "converted": []}
    for name, each in (("plain", model), ("converted", converted)):
        layer = cast(Any, each).model.layers[4].mlp.down_proj
        layer.register_forward_hook(lambda *call, n=name: seen[n].append(call[-1].detach().clone()))
        each(*args, **kwargs)
    if executor == "eager":
        assert torch.equal(seen["plain"][0], seen["converted"][0])
    torch.testing.assert_close(seen["converted"][0], seen["plain"][0], rtol=1e-5, atol=1e-6)


def test_lossless_with_sites_left_out() -> None:
    model = RESNET.build(torch.float64)
    args, kwargs = RESNET.arguments()
    config = AttnResConfig(sites=("stages.0[1::2]", "stages.2"))
    converted = attnres_compile.convert(copy.deepcopy(model), args, kwargs, config=config)
    assert attnres_compile.verify(model, converted, args, kwargs).passed
    stripped = attnres_compile.strip(converted)
    assert stripped.state_dict().keys() == model.state_dict().keys()


def test_a_site_that_does_not_exist() -> None:
    with pytest.raises(ConfigError) as raised:
        planned(LLAMA, sites=("*.self_atn",))
    assert str(raised.value).startswith(
        "sites='*.self_atn' matches no site with several sources of this model; the nearest of its "
        "paths: model.layers.1.self_attn"
    )
    # The root has one source, so that a mix there would choose nothing.
    with pytest.raises(ConfigError, match="matches no site with several sources"):
        planned(LLAMA, sites=("model.layers.0.input_layernorm",))


def test_every_site_left_out() -> None:
    model = LLAMA.build(torch.float64)
    config = AttnResConfig(sites=("!model",))
    with pytest.raises(NothingToConvertError, match="left out by the option sites"):
        attnres_compile.convert(model, *LLAMA.arguments(), config=config)


def test_another_path_through_the_model_is_still_an_error() -> None:
    """A left-out site is checked like the others: what is not in the plan is not computed."""
    from attnres_compile.errors import MismatchError

    class Tapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor, tap: bool = False) -> Tensor:
            for layer in self.layers[:2]:
                x = x + layer(x)
            tapped = x.tanh() if tap else 0.0
            return x + self.layers[2](x.sin() if tap else x) + tapped

    x = torch.randn(2, 4)
    config = AttnResConfig(sites=("layers.1",))
    converted = attnres_compile.convert(Tapped(), (x,), config=config)
    assert [site.left_out for site in converted.plan.streams[0].sites] == [  # type: ignore[union-attr]
        False,
        False,
        True,
        True,
    ]
    converted(x)
    with pytest.raises(MismatchError):
        converted(x, tap=True)


def test_blocks_of_each_stream() -> None:
    def blocks(**options: Any) -> list[int]:
        return [len(stream.blocks) for stream in planned(T5, **options).streams]

    assert blocks() == [8, 8]
    assert blocks(num_blocks={"encoder": 2, "decoder": "full"}) == [2, 9]
    assert blocks(num_blocks={"encoder": 2}) == [2, 8]
    assert blocks(num_blocks={"*": 3, "encoder": 2}) == [3, 3]  # the first that matches
    assert blocks(num_blocks={"encoder": 4, "*": 3}) == [4, 3]


def test_lengths_of_the_blocks_of_each_stream() -> None:
    """An encoder of 4 layers and 8 sublayers, a decoder of 3 layers and 9 sublayers."""
    streams = planned(T5, num_blocks={"encoder": 2, "decoder": 3}).streams
    assert [[len(b) for b in stream.blocks] for stream in streams] == [[4, 4], [3, 3, 3]]


def test_too_many_blocks_for_one_stream() -> None:
    assert len(planned(T5, num_blocks={"encoder": 8, "decoder": 9}).streams[1].blocks) == 9
    with pytest.raises(ConfigError) as raised:
        planned(T5, num_blocks={"encoder": 9})
    assert str(raised.value) == (
        "num_blocks=9 is more than the 8 sublayers of the deepest stream it is asked for; ask for "
        "at most 8, or for 'full'."
    )
    with pytest.raises(ConfigError, match=r"num_blocks='middle' matches no residual stream"):
        planned(T5, num_blocks={"middle": 2})


def test_what_is_shown() -> None:
    found = planned(LLAMA, sites=("*.self_attn",))
    text = str(found)
    assert "11, 4 of them with a query and a key gain, 6 left out by the option" in text
    assert "want of a gradient" not in text
    assert "sites=('*.self_attn',)" in text
    assert "model.layers.0.post_attention_layernorm (left out)" in as_dot(found)
    assert "left out" not in str(planned(LLAMA))


CHOSEN = AttnResConfig(num_blocks={"layers": 2, "*": "full"}, sites=("layers[1::2]",))


def test_a_file_keeps_what_was_chosen(tmp_path: Path) -> None:
    """Of the tower's four layers, the second and fourth; its last site is read by the norm."""
    x = tower_inputs()
    converted = attnres_compile.convert(tower(), (x,), config=CHOSEN)
    names = [name for name, _ in converted.named_parameters() if name.endswith("query")]
    assert names == [f"attnres.before_layers_{n}_norm.query" for n in (1, 3)]
    with torch.no_grad():
        for name in names:
            converted.get_parameter(name).normal_()
    attnres_compile.save(converted, tmp_path / "chosen.pt")
    loaded = cast(Any, attnres_compile.load(tmp_path / "chosen.pt", tower()))
    assert loaded.plan == converted.plan
    assert loaded.plan.config == CHOSEN
    assert torch.equal(loaded(x), converted(x))
    assert not torch.allclose(loaded(x), tower()(x))


def test_the_names_of_others_have_no_left_out_sites(tmp_path: Path) -> None:
    config = AttnResConfig(aggregate="mean", sites=("*.self_attn",))
    model = attnres_compile.convert(
        LLAMA.build(torch.float32), *LLAMA.arguments(torch.float32), config=config
    )
    with pytest.raises(ConfigError, match="leaves out before_layers_0_post_attention_layernorm"):
        attnres_compile.save(model, tmp_path / "x.safetensors", names="kimi")


def test_options_as_json_and_toml(tmp_path: Path) -> None:
    assert json.loads(json.dumps(CHOSEN.to_json()))["num_blocks"] == {"layers": 2, "*": "full"}
    (tmp_path / "options.toml").write_text(as_toml(CHOSEN))
    assert AttnResConfig(**read_config(tmp_path / "options.toml")) == CHOSEN
    assert hash(CHOSEN) == hash(AttnResConfig(**CHOSEN.to_json()))


def test_a_graph_takes_the_options_too() -> None:
    """A layer of an exported program is known by its path as well."""
    x = tower_inputs()
    program = torch.export.export(tower(), (x,))
    converted = attnres_compile.convert(program, config=AttnResConfig(sites=("norm",)))
    assert [n for n in converted.state_dict if n.startswith("attnres.")] == [
        "attnres.before_norm.query",
        "attnres.before_norm.gain",
    ]
    mixes = [node for node in converted.graph.nodes if node.target is torch.ops.attnres.mix.default]
    assert len(mixes) == 1
    torch.testing.assert_close(converted.module()(x), tower()(x))
