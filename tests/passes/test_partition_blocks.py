"""Blocks by design.md's rules: clipped per stream, boundaries between layers, remainder last."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnres_compile.config import AttnResConfig
from attnres_compile.passes.partition_blocks import AUTO_BLOCKS, layers_of, partition_blocks


def two_sublayers_each(layers: int) -> list[str]:
    return [str(layer) for layer in range(layers) for _ in range(2)]


@pytest.mark.parametrize(
    ("layers", "options", "blocks"),
    [
        (12, {}, (2, 2, 2, 2, 2, 2, 2, 10)),
        (16, {}, (4,) * 8),
        (2, {}, (1, 1, 1, 1)),
        (12, {"num_blocks": 3}, (8, 8, 8)),
        (13, {"num_blocks": 3}, (8, 8, 10)),
        (12, {"num_blocks": 1}, (24,)),
        (12, {"num_blocks": "full"}, (1,) * 24),
        (3, {"num_blocks": 4}, (1, 1, 1, 3)),
        (3, {"num_blocks": 6}, (1,) * 6),
        (2, {"num_blocks": 9}, (1, 1, 1, 1)),
        (3, {"block_sublayers": 1}, (1,) * 6),
        (3, {"block_sublayers": 4}, (4, 2)),
        (3, {"block_sublayers": 9}, (6,)),
        (4, {"block_sublayers": 3}, (3, 3, 2)),
    ],
)
def test_blocks_of_a_stream_of_two_sublayers_per_layer(
    layers: int, options: dict[str, Any], blocks: tuple[int, ...]
) -> None:
    assert partition_blocks(two_sublayers_each(layers), AttnResConfig(**options)) == blocks


def test_boundaries_fall_between_layers_of_unequal_length() -> None:
    layers = ["a", "a", "a", "b", "c", "c", "d"]
    assert partition_blocks(layers, AttnResConfig(num_blocks=2)) == (4, 3)
    assert partition_blocks(layers, AttnResConfig(num_blocks=4)) == (3, 1, 2, 1)
    # Fewer layers than blocks: then sublayers are counted.
    assert partition_blocks(layers, AttnResConfig(num_blocks=5)) == (1, 1, 1, 1, 3)


def test_a_layer_that_comes_back_is_another_layer() -> None:
    looped = ["a", "a", "b", "b", "a", "a"]
    assert partition_blocks(looped, AttnResConfig(num_blocks=3)) == (2, 2, 2)


@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=20),
    num_blocks=st.one_of(st.integers(1, 90), st.sampled_from(["auto", "full"])),
)
def test_blocks_hold_every_sublayer_once(lengths: list[int], num_blocks: Any) -> None:
    layers = [str(layer) for layer, length in enumerate(lengths) for _ in range(length)]
    blocks = partition_blocks(layers, AttnResConfig(num_blocks=num_blocks))
    asked = {"auto": AUTO_BLOCKS, "full": len(layers)}.get(num_blocks, num_blocks)
    assert sum(blocks) == len(layers)
    assert len(blocks) == min(asked, len(layers))
    assert min(blocks) > 0
    if len(lengths) >= len(blocks):
        ends = {sum(lengths[: end + 1]) for end in range(len(lengths))}
        assert {sum(blocks[: end + 1]) for end in range(len(blocks))} <= ends


@given(sublayers=st.integers(1, 60), size=st.integers(1, 70))
def test_blocks_of_a_fixed_size(sublayers: int, size: int) -> None:
    blocks = partition_blocks([""] * sublayers, AttnResConfig(block_sublayers=size))
    assert sum(blocks) == sublayers
    assert set(blocks[:-1]) <= {size}
    assert 0 < blocks[-1] <= size


@pytest.mark.parametrize(
    ("paths", "layers"),
    [
        (["h.0.attn", "h.0.mlp", "h.1.attn"], ["h.0", "h.0", "h.1"]),
        (["m.layers.0", "m.layers.0", "m.layers.1"], ["m.layers.0", "m.layers.0", "m.layers.1"]),
        (["enc.0.a.b", "enc.1.a.b"], ["enc.0", "enc.1"]),
        (["0", "1"], ["0", "1"]),
        # One module, or the model itself: every sublayer is a layer of its own.
        (["block", "block"], ["block#0", "block#1"]),
        (["", ""], ["#0", "#1"]),
        (["layers.0", "layers.1", "layers"], ["layers.0#0", "layers.1#1", "layers#2"]),
    ],
)
def test_layers_are_where_the_paths_part(paths: list[str], layers: list[str]) -> None:
    assert layers_of(paths) == layers
