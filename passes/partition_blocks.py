"""Divide the sublayers of a stream into blocks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise

from attnres_compile.config import AttnResConfig

AUTO_BLOCKS = 8
"""Blocks per stream for ``num_blocks="auto"``, the paper's choice (arXiv 2603.15031, section 5)."""


def layers_of(module_paths: Sequence[str]) -> list[str]:
    """The layer each sublayer belongs to: its path down to where the stream's paths part.

    A stream whose sublayers share one module has no layers to speak of; then each sublayer is its
    own.

    Example:
        >>> layers_of(["h.0.attn", "h.0.mlp", "h.1.attn"])
        ['h.0', 'h.0', 'h.1']
    """
    parts = [path.split(".") if path else [] for path in module_paths]
    shared = 0
    while all(len(part) > shared for part in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    if len(set(module_paths)) < 2 or any(len(part) <= shared for part in parts):
        return [f"{path}#{index}" for index, path in enumerate(module_paths)]
    return [".".join(part[: shared + 1]) for part in parts]


def partition_blocks(layers: Sequence[str], config: AttnResConfig) -> tuple[int, ...]:
    """How many sublayers each block has.

    Args:
        layers: the layer of each sublayer, in order (`layers_of`).
        config: `num_blocks` is clipped to the number of sublayers here; that it fits the deepest
            stream is checked where all streams are known.

    Returns:
        Block lengths in sublayers; they sum to ``len(layers)``. With at least as many layers as
        blocks, boundaries fall between layers. The last block holds the remainder.

    Example:
        >>> partition_blocks(["0", "0", "1", "1", "2", "2"], AttnResConfig(num_blocks=2))
        (2, 4)
    """
    sublayers = len(layers)
    if config.block_sublayers is not None:
        return _chunks(sublayers, config.block_sublayers)
    blocks = _number_of_blocks(sublayers, config)
    layer_lengths = [len(list(group)) for _, group in groupby(layers)]
    if len(layer_lengths) < blocks:
        return _evenly([1] * sublayers, blocks)
    return _evenly(layer_lengths, blocks)


def _number_of_blocks(sublayers: int, config: AttnResConfig) -> int:
    if config.num_blocks == "full":
        return sublayers
    if config.num_blocks == "auto":
        return min(AUTO_BLOCKS, sublayers)
    assert isinstance(config.num_blocks, int), "a mapping is resolved per stream before"
    return min(config.num_blocks, sublayers)


def _chunks(sublayers: int, size: int) -> tuple[int, ...]:
    full, rest = divmod(sublayers, size)
    return (size,) * full + ((rest,) if rest else ())


def _evenly(lengths: list[int], blocks: int) -> tuple[int, ...]:
    """Groups of ``len(lengths) // blocks`` items each; the last takes the remainder."""
    size = len(lengths) // blocks
    starts = [index * size for index in range(blocks)] + [len(lengths)]
    return tuple(sum(lengths[a:b]) for a, b in pairwise(starts))
