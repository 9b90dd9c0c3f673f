"""The options of a conversion, validated on construction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from attnres_compile.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class AttnResConfig:
    """What a conversion should do.

    Attributes:
        num_blocks: blocks per residual stream. ``"auto"`` is ``min(8, sublayers)`` for each
            stream, ``"full"`` is one sublayer per block (Full AttnRes). A number is clipped to
            the sublayers of a shallower stream, and is an error above those of the deepest one.
            When a stream has at least as many layers as blocks, boundaries fall between layers;
            the remainder goes to the last block.
        block_sublayers: sublayers per block, instead of ``num_blocks``; the last block holds the
            remainder. (The paper's S; Kimi K3's ``attn_res_block_size`` counts layers.)
        aggregate: ``"sum"`` multiplies each mix by its number of sources, so that zero queries
            reproduce the residual stream for every reader: the conversion starts lossless.
            ``"mean"`` is the paper's form; zero queries then reproduce it up to a factor that a
            scale-invariant norm removes, up to its eps.
        key_gain: give each site a learnable gain [D] on its normalised keys. It only ever acts
            through ``query * gain``, so that ``False`` loses no expressiveness.
        eps: added to the mean square in the RMSNorm of the keys.
        streams: which residual streams to convert, as glob patterns over their names
            (``"encoder"`` also matches ``encoder.block``); ``"!pattern"`` leaves streams out.
            ``None`` converts all. A pattern that matches no stream is an error.
        delta_sources: convert the streams too whose state passes a norm, an activation, a scale,
            dropout or a cast between additions (post-norm, ResNet, DeepNorm). Their sources are
            the root and the differences that blocks make to the state, which sum to it as well;
            the additions themselves stay. This goes beyond the paper.

    Raises:
        ConfigError: on any value out of range, or on both ways of saying the block size at once.

    Example:
        >>> AttnResConfig(num_blocks=4).aggregate
        'sum'
    """

    num_blocks: int | Literal["auto", "full"] = "auto"
    block_sublayers: int | None = None
    aggregate: Literal["sum", "mean"] = "sum"
    key_gain: bool = True
    eps: float = 1e-6
    streams: tuple[str, ...] | None = None
    delta_sources: bool = False

    def __post_init__(self) -> None:
        if self.block_sublayers is not None and self.num_blocks != "auto":
            raise ConfigError(
                f"num_blocks={self.num_blocks!r} and block_sublayers={self.block_sublayers} both "
                "say how long a block is; set only one of them."
            )
        if self.num_blocks not in ("auto", "full") and not _is_positive_int(self.num_blocks):
            raise ConfigError(
                f"num_blocks must be 'auto', 'full' or a positive integer, not {self.num_blocks!r}."
            )
        if self.block_sublayers is not None and not _is_positive_int(self.block_sublayers):
            raise ConfigError(
                f"block_sublayers must be a positive integer, not {self.block_sublayers!r}."
            )
        if self.aggregate not in ("sum", "mean"):
            raise ConfigError(f"aggregate must be 'sum' or 'mean', not {self.aggregate!r}.")
        if not isinstance(self.key_gain, bool):
            raise ConfigError(f"key_gain must be True or False, not {self.key_gain!r}.")
        if not isinstance(self.delta_sources, bool):
            raise ConfigError(f"delta_sources must be True or False, not {self.delta_sources!r}.")
        if not isinstance(self.eps, int | float) or not 0 < self.eps < 1:
            raise ConfigError(f"eps must lie between 0 and 1, not {self.eps!r}.")
        if self.streams is not None:
            object.__setattr__(self, "streams", _patterns(self.streams))

    def to_json(self) -> dict[str, Any]:
        """The options as a dictionary of JSON values."""
        return asdict(self)


def _patterns(streams: object) -> tuple[str, ...]:
    if isinstance(streams, str):
        raise ConfigError(f"streams takes a tuple of patterns; write streams=({streams!r},).")
    if not isinstance(streams, Iterable) or isinstance(streams, Mapping):
        raise ConfigError(f"streams takes a tuple of patterns, not {streams!r}.")
    patterns = tuple(streams)
    if not patterns:
        raise ConfigError("streams=() converts nothing; leave it out to convert every stream.")
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f"streams takes a tuple of patterns, not {streams!r}.")
    return patterns


def _is_positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
