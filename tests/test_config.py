"""Options are checked when they are set, each with one sentence."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnres_compile
from attnres_compile import AttnResConfig
from attnres_compile.errors import AttnResError, ConfigError


def test_defaults() -> None:
    config = AttnResConfig()
    assert config.to_json() == {
        "num_blocks": "auto",
        "block_sublayers": None,
        "aggregate": "sum",
        "key_gain": True,
        "eps": 1e-6,
        "streams": None,
        "sites": None,
        "delta_sources": False,
    }
    assert json.loads(json.dumps(config.to_json())) == config.to_json()


def test_it_is_a_value() -> None:
    assert AttnResConfig(num_blocks=4) == AttnResConfig(num_blocks=4)
    assert len({AttnResConfig(), AttnResConfig(streams=("a",)), AttnResConfig(streams=("a",))}) == 2
    with pytest.raises(FrozenInstanceError):
        AttnResConfig().num_blocks = 3  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        AttnResConfig(4)  # type: ignore[misc]


def test_a_list_of_streams_becomes_a_tuple() -> None:
    patterns: Any = ["encoder", "!decoder"]
    assert AttnResConfig(streams=patterns).streams == ("encoder", "!decoder")


@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": 1},
        {"num_blocks": "full"},
        {"block_sublayers": 1},
        {"aggregate": "mean"},
        {"eps": 1e-12},
        {"key_gain": False},
    ],
)
def test_values_in_range(options: dict[str, Any]) -> None:
    AttnResConfig(**options)


ERRORS = [
    (
        {"num_blocks": 3, "block_sublayers": 2},
        "num_blocks=3 and block_sublayers=2 both say how long a block is; set only one of them.",
    ),
    (
        {"num_blocks": "full", "block_sublayers": 2},
        "num_blocks='full' and block_sublayers=2 both say how long a block is; set only one of "
        "them.",
    ),
    ({"num_blocks": 0}, "num_blocks must be 'auto', 'full' or a positive integer, not 0."),
    ({"num_blocks": -2}, "num_blocks must be 'auto', 'full' or a positive integer, not -2."),
    ({"num_blocks": 2.0}, "num_blocks must be 'auto', 'full' or a positive integer, not 2.0."),
    ({"num_blocks": True}, "num_blocks must be 'auto', 'full' or a positive integer, not True."),
    ({"num_blocks": "all"}, "num_blocks must be 'auto', 'full' or a positive integer, not 'all'."),
    ({"num_blocks": None}, "num_blocks must be 'auto', 'full' or a positive integer, not None."),
    ({"block_sublayers": 0}, "block_sublayers must be a positive integer, not 0."),
    ({"block_sublayers": 1.5}, "block_sublayers must be a positive integer, not 1.5."),
    ({"block_sublayers": True}, "block_sublayers must be a positive integer, not True."),
    ({"aggregate": "max"}, "aggregate must be 'sum' or 'mean', not 'max'."),
    ({"key_gain": "no"}, "key_gain must be True or False, not 'no'."),
    ({"eps": 0}, "eps must lie between 0 and 1, not 0."),
    ({"eps": -1e-6}, "eps must lie between 0 and 1, not -1e-06."),
    ({"eps": 1}, "eps must lie between 0 and 1, not 1."),
    ({"eps": float("nan")}, "eps must lie between 0 and 1, not nan."),
    ({"eps": "tiny"}, "eps must lie between 0 and 1, not 'tiny'."),
    ({"streams": "encoder"}, "streams takes a tuple of patterns; write streams=('encoder',)."),
    ({"streams": (1,)}, "streams takes a tuple of patterns, not (1,)."),
    ({"streams": 3}, "streams takes a tuple of patterns, not 3."),
    ({"delta_sources": 1}, "delta_sources must be True or False, not 1."),
    ({"streams": ()}, "streams=() converts nothing; leave it out to convert every stream."),
    ({"sites": "norm"}, "sites takes a tuple of patterns; write sites=('norm',)."),
    ({"sites": ()}, "sites=() converts nothing; leave it out to convert every site."),
    ({"sites": {"a": 1}}, "sites takes a tuple of patterns, not {'a': 1}."),
    (
        {"num_blocks": {}},
        "num_blocks={} should map patterns over streams to numbers, as in {'encoder': 4, "
        "'decoder': 'full'}.",
    ),
    (
        {"num_blocks": {1: 2}},
        "num_blocks={1: 2} should map patterns over streams to numbers, as in {'encoder': 4, "
        "'decoder': 'full'}.",
    ),
    (
        {"num_blocks": {"a": 0}},
        "num_blocks must be 'auto', 'full' or a positive integer, not 0.",
    ),
    (
        {"num_blocks": {"!a": 2}},
        "num_blocks gives no number to all but 'a'; name them.",
    ),
    (
        {"num_blocks": {"a": 3}, "block_sublayers": 2},
        "num_blocks={'a': 3} and block_sublayers=2 both say how long a block is; set only one of "
        "them.",
    ),
]


@pytest.mark.parametrize(("options", "sentence"), ERRORS, ids=[str(error[0]) for error in ERRORS])
def test_each_error_is_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        AttnResConfig(**options)
    assert str(raised.value) == sentence
    assert isinstance(raised.value, AttnResError)
    assert isinstance(raised.value, ValueError)


# Options that are checked against a model.


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x))


class Encoder(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Two(nn.Module):
    """A stream of three sublayers and one of five."""

    def __init__(self) -> None:
        super().__init__()
        self.left = Encoder(3)
        self.right = Encoder(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.right(torch.tanh(self.left(x)))


INPUT = (torch.zeros(2, 8),)


def plan(**options: Any) -> attnres_compile.ConversionPlan:
    return attnres_compile.plan(Two(), INPUT, config=AttnResConfig(**options))


def blocks(planned: attnres_compile.ConversionPlan) -> list[list[int]]:
    return [[len(block) for block in stream.blocks] for stream in planned.streams]


def test_blocks_are_clipped_per_stream() -> None:
    assert blocks(plan()) == [[1] * 3, [1] * 5]
    assert blocks(plan(num_blocks=4)) == [[1, 1, 1], [1, 1, 1, 2]]
    assert blocks(plan(num_blocks=5)) == [[1] * 3, [1] * 5]
    assert blocks(plan(block_sublayers=4)) == [[3], [4, 1]]


def test_more_blocks_than_the_deepest_stream_has_sublayers() -> None:
    with pytest.raises(ConfigError) as raised:
        plan(num_blocks=6)
    assert str(raised.value) == (
        "num_blocks=6 is more than the 5 sublayers of the model's deepest stream; ask for at most "
        "5, or for 'full'."
    )


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (("left",), ["left.layers"]),
        (("left.layers",), ["left.layers"]),
        (("*.layers",), ["left.layers", "right.layers"]),
        (("!left",), ["right.layers"]),
        (("*", "!right.*"), ["left.layers"]),
    ],
)
def test_streams_are_chosen_by_name(patterns: tuple[str, ...], names: list[str]) -> None:
    planned = plan(streams=patterns)
    assert [stream.name for stream in planned.streams] == names
    left_out = [refusal for refusal in planned.refusals if refusal.kind == "left-out"]
    assert len(left_out) == 8 - planned.num_residual_additions


@pytest.mark.parametrize("pattern", ["middle", "!middle", "lef", "layers"])
def test_a_stream_that_does_not_exist(pattern: str) -> None:
    with pytest.raises(ConfigError) as raised:
        plan(streams=(pattern,))
    assert str(raised.value) == (
        f"streams={pattern!r} matches no residual stream of this model; it has: left.layers, "
        "right.layers."
    )


def test_blocks_are_checked_against_the_streams_that_are_converted() -> None:
    assert blocks(plan(num_blocks=3, streams=("left",))) == [[1, 1, 1]]
    with pytest.raises(ConfigError, match="num_blocks=5 is more than the 3 sublayers"):
        plan(num_blocks=5, streams=("left",))


def test_convert_takes_a_plan_or_options() -> None:
    planned = plan()
    with pytest.raises(ConfigError) as raised:
        attnres_compile.convert(Two(), INPUT, config=AttnResConfig(), plan=planned)
    assert str(raised.value) == "a plan has its config already; pass either plan or config."
    with pytest.raises(ConfigError) as raised:
        attnres_compile.convert(Two(), INPUT, executor="fast")  # type: ignore[arg-type]
    assert str(raised.value) == "executor must be 'eager' or 'attnres', not 'fast'."
