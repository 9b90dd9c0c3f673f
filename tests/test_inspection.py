"""Depth attention: its weights against hand-written ones, its labels, and its picture."""

from __future__ import annotations

import builtins
import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnres_compile
from attnres_compile import AttnResConfig
from attnres_compile.errors import AttnResError, InputError
from attnres_compile.inspection import DepthAttention, attnres_parameters
from conversions import LLAMA, randomize, sites_of
from handwritten_extra import Looped
from handwritten_models import GPTBlock, TokenModel
from oracle_cases import CASES, OracleCase, run_oracle
from oracle_mixer import Mixing, Read, SiteParameters

RESNET = CASES[-1]


@pytest.mark.parametrize("case", [LLAMA, RESNET], ids=str)
def test_weights_are_those_of_the_hand_written_forward(case: OracleCase) -> None:
    model = case.build()
    args, kwargs = case.arguments()
    config = AttnResConfig(num_blocks=3)
    converted: Any = attnres_compile.convert(copy.deepcopy(model), args, kwargs, config=config)
    randomize(converted)
    sites = sites_of(converted)
    reads = run_oracle(case, model, Mixing(sites, num_blocks=3)).reads

    attention = attnres_compile.depth_attention(converted, args, kwargs)

    assert len(attention.weights) == len(sites)
    for stream in converted.plan.streams:
        for site in stream.sites[1:]:
            key = (stream.name, site.depth)
            expected = weights_by_hand(reads[key], sites[key], stream.channel_dim)
            actual = attention.weights[site.query_name.removesuffix(".query")]
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def weights_by_hand(read: Read, site: SiteParameters, dim: int) -> Tensor:
    """[sources, *tokens], from the formula."""
    sources = torch.stack([source.movedim(dim, -1) for source in read.sources])
    keys = site.gain * sources / (sources.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return torch.softmax(keys @ site.query, dim=0)


def test_zero_queries_weigh_all_sources_alike() -> None:
    attention = attnres_compile.depth_attention(small(num_blocks=2), (IDX,))

    for name, weights in attention.weights.items():
        torch.testing.assert_close(weights, torch.full_like(weights, 1 / len(weights)))
        assert attention.entropy()[name] == pytest.approx(math.log(len(weights)))


def test_sources_are_labelled_by_block() -> None:
    """Blocks of one layer and of two: at the end of a block there is no partial sum."""
    attention = attnres_compile.depth_attention(small(num_blocks=2), (IDX,))

    assert list(attention.sources.values()) == [
        ("root", "partial"),
        ("root", "block 1"),
        ("root", "block 1", "partial"),
        ("root", "block 1", "partial"),
        ("root", "block 1", "partial"),
        ("root", "block 1", "block 2"),
    ]
    assert next(iter(attention.weights)) == "attnres.before_blocks_0_norm_2"
    assert set(attention.streams.values()) == {"blocks"}


def test_a_call_changes_nothing_in_any_mode() -> None:
    args, kwargs = RESNET.arguments(torch.float32)
    converted = attnres_compile.convert(RESNET.build(torch.float32), args, kwargs).train()
    before = copy.deepcopy(converted.state_dict())

    attention = attnres_compile.depth_attention(converted, args, kwargs)

    assert converted.training
    assert not any(weights.requires_grad for weights in attention.weights.values())
    for name, value in converted.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_executor_does_not_matter() -> None:
    eager = small(num_blocks=2)
    lowered = small(num_blocks=2, executor="attnres")
    lowered.load_state_dict(eager.state_dict())

    expected = attnres_compile.depth_attention(eager, (IDX,)).weights
    actual = attnres_compile.depth_attention(lowered, (IDX,)).weights

    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_a_looped_stream_keeps_its_first_run() -> None:
    model = Looped(width=16, loops=2).eval()
    x = torch.randn(2, 3, 16)
    converted: Any = attnres_compile.convert(model, (x,))
    randomize(converted)

    attention = attnres_compile.depth_attention(converted, (x,))

    assert all(w.shape[1:] == (2, 3) for w in attention.weights.values())


def test_a_model_inside_a_wrapper_keeps_its_labels() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small(num_blocks=2)

        def forward(self, idx: Tensor) -> Tensor:
            return self.inner(idx)

    attention = attnres_compile.depth_attention(Wrapper(), (IDX,))

    assert attention.sources["inner.attnres.before_blocks_0_norm_2"] == ("root", "partial")


def test_a_graph_module_can_be_inspected() -> None:
    traced = torch.fx.symbolic_trace(PreNorm())
    x = torch.randn(2, 3, 8)
    converted: Any = attnres_compile.convert(traced, (x,))

    attention = attnres_compile.depth_attention(converted, (x,))

    assert [len(weights) for weights in attention.weights.values()] == [2, 3]


def test_to_json_has_means_and_entropies() -> None:
    converted = small(num_blocks=2)
    randomize(converted)
    attention = attnres_compile.depth_attention(converted, (IDX,))

    sites = json.loads(json.dumps(attention.to_json()))["sites"]

    assert [site["name"] for site in sites] == list(attention.weights)
    for site in sites:
        assert len(site["mean"]) == len(site["sources"])
        assert sum(site["mean"]) == pytest.approx(1, abs=1e-5)
        assert 0 <= site["entropy"] <= math.log(len(site["sources"]))


@pytest.mark.parametrize("name", ["depth.png", "depth.svg"])
def test_plot_writes_a_whole_picture(tmp_path: Path, name: str) -> None:
    made_up(sites=30).plot(tmp_path / name)

    content = (tmp_path / name).read_bytes()
    assert content.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_plot_names_every_site_and_source(tmp_path: Path) -> None:
    attention = made_up(sites=30)
    attention.plot(tmp_path / "depth.svg")

    text = (tmp_path / "depth.svg").read_text()
    for label in ("layers_0_norm", "layers_29_norm", "block 29", "partial", "root", "model.layers"):
        assert f"<!-- {label} -->" in text


def test_a_failed_plot_leaves_the_old_picture(tmp_path: Path) -> None:
    path = tmp_path / "depth.png"
    path.write_bytes(b"old")
    attention = made_up(sites=2)
    broken = DepthAttention(
        {"attnres.a": torch.ones(2, 3)}, {"attnres.a": ("root",)}, {"attnres.a": "s"}
    )

    with pytest.raises(Exception, match="shape"):
        broken.plot(path)
    assert path.read_bytes() == b"old"
    attention.plot(path)
    assert path.read_bytes() != b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_plot_refuses_other_formats(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"depth\.bmp: a picture must end in \.png or \.svg\."):
        made_up(sites=2).plot(tmp_path / "depth.bmp")


def test_plot_without_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import = builtins.__import__

    def no_matplotlib(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(
        AttnResError, match=r"needs matplotlib: pip install 'attnres-compile\[viz\]'"
    ):
        made_up(sites=2).plot(tmp_path / "depth.png")


def test_an_unconverted_model_is_refused() -> None:
    with pytest.raises(
        InputError, match="PreNorm carries no conversion plan; pass the whole model"
    ):
        attnres_compile.depth_attention(PreNorm(), (torch.randn(2, 3, 8),))
    with pytest.raises(InputError, match="PreNorm has no Attention Residuals of attnres_compile"):
        attnres_parameters(PreNorm())


def test_weights_on_the_meta_device_are_refused() -> None:
    with pytest.raises(InputError, match="weights of TokenModel lie on the meta device"):
        attnres_compile.depth_attention(small(num_blocks=2).to("meta"), (IDX,))


IDX = torch.arange(10).reshape(2, 5)


class PreNorm(nn.Module):
    """Two sublayers that symbolic_trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layers[0](self.norms[0](x))
        x = x + self.layers[1](self.norms[1](x))
        return self.norms[2](x)


def small(*, num_blocks: int, executor: Any = "eager") -> nn.Module:
    """Three layers of two sublayers each."""
    model = TokenModel(*(GPTBlock(16, 2) for _ in range(3)), width=16).eval()
    config = AttnResConfig(num_blocks=num_blocks)
    return attnres_compile.convert(model, (IDX,), config=config, executor=executor)


def made_up(*, sites: int) -> DepthAttention:
    """Full AttnRes: every site sees one source more, all alike."""
    weights, sources = {}, {}
    for index in range(sites):
        name = f"model.attnres.before_layers_{index}_norm"
        blocks = [f"block {number}" for number in range(1, index + 1)]
        sources[name] = ("root", *blocks, "partial")
        weights[name] = torch.full((len(blocks) + 2, 2, 3), 1 / (len(blocks) + 2))
    return DepthAttention(weights, sources, dict.fromkeys(weights, "model.layers"))
