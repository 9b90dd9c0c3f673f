"""`plan.why(path)`: the sentence for each addition that the user names."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnres_compile
from attnres_compile import AttnResConfig
from attnres_compile.cli import main
from attnres_compile.errors import InputError
from conversions import Tower, tower, tower_inputs


class Mixed(nn.Module):
    """A stream of two sublayers, embeddings, a gate, and a block whose skip is scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Linear(4, 8), nn.Linear(4, 8)
        self.tower = nn.ModuleList(Mixed.Layer() for _ in range(2))
        self.last = Mixed.Scaled()

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions(x)
        for layer in self.tower:
            h = layer(h)
        return self.last(torch.tanh(h))

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return x + (y * y.sigmoid() + y)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * x + self.linear(F.layer_norm(x, (8,)))


X = torch.randn(3, 4)


def sentences(path: str, config: AttnResConfig | None = None) -> list[str]:
    """Verdict, rule and reason without the place."""
    found = attnres_compile.plan(Mixed(), (X,), config=config).why(path).explanations
    return [f"{each.verdict}/{each.rule}: {each.reason}" for each in found]


GATE = (
    "none/element-wise: only element-wise operations lie between the skip and the branch (as in a "
    "gate, an activation or a rotary embedding)"
)


def test_the_additions_of_one_layer() -> None:
    assert sentences("tower.1") == [
        GATE,
        "residual/residual: residual addition 2 of 2 of the stream tower, in sublayer 2 of 2, "
        "block 2 of 2; its readers get the mix of site before_tanh over 3 sources",
    ]


def test_a_whole_model_and_a_pattern() -> None:
    everything = sentences("")
    assert [sentence.partition(":")[0] for sentence in everything] == [
        "none/independent",
        "none/element-wise",
        "residual/residual",
        "none/element-wise",
        "residual/residual",
        "refused/scaled-carrier",
    ]
    assert sentences("tower[1:]") == sentences("tower.1")
    assert sentences("last") == everything[-1:]


def test_what_the_options_left_out() -> None:
    sites = AttnResConfig(sites=("tower.1",))
    assert sentences("tower.1", sites)[1].endswith(
        "its readers get the state as it was (site before_tanh is left out by the option sites)"
    )
    assert sentences("tower.0", sites)[1].endswith(
        "its readers get the mix of site before_tower_1_linear over 2 sources"
    )
    streams = AttnResConfig(streams=("!tower",))
    assert sentences("tower.0", streams) == [
        GATE,
        "refused/left-out: left out by the option streams",
    ]


def test_a_stream_that_is_refused_as_a_whole() -> None:
    class Unbatched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolutions = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for convolution in self.convolutions:
                x = x + convolution(x)
            return x

    plan = attnres_compile.plan(Unbatched(), (torch.randn(4, 6, 6),))
    # two calls on one line: what is the same is said once
    assert [each.rule for each in plan.why().explanations] == ["unbatched-convolution"]


def test_a_path_without_additions() -> None:
    plan = attnres_compile.plan(tower(), (tower_inputs(),))
    with pytest.raises(InputError) as raised:
        plan.why("layers.7")
    assert str(raised.value).startswith(
        "no addition was traced in 'layers.7'; there are some in layers."
    )
    bare = dataclasses.replace(plan, explanations=())
    with pytest.raises(InputError, match="was read from a file"):
        bare.why("layers")


def test_a_file_does_not_hold_them(tmp_path: Path) -> None:
    converted = attnres_compile.convert(tower(), (tower_inputs(),))
    attnres_compile.save(converted, tmp_path / "a.pt")
    loaded = attnres_compile.load(tmp_path / "a.pt", Tower().eval())
    assert "explanations" not in loaded.plan.to_json()  # type: ignore[union-attr]
    assert not loaded.plan.explanations  # type: ignore[union-attr]


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(tower().state_dict(), tmp_path / "plain.pt")
    argv = ["plan", str(tmp_path / "plain.pt"), "--model", "conversions:tower"]
    argv += ["--input-shape", "6,5", "--why"]
    assert main([*argv, "layers.2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("layers.2, conversions.py:")
    assert "converted: residual addition 3 of 4 of the stream layers, in sublayer 3 of 4" in out
    assert main([*argv, "layers.2", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["explanations"]
    assert (found["module_path"], found["verdict"]) == ("layers.2", "residual")
    assert main([*argv, "nowhere"]) == 2
    assert "no addition was traced in 'nowhere'" in capsys.readouterr().err
