"""The options of a conversion, validated on construction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from attnres_compile.errors import ConfigError

Blocks: TypeAlias = int | Literal["auto", "full"]


@dataclass(frozen=True, kw_only=True)
class AttnResConfig:
    """What a conversion should do.

    Attributes:
        num_blocks: blocks per residual stream. ``"auto"`` is ``min(8, sublayers)`` for each
            stream, ``"full"`` is one sublayer per block (Full AttnRes). A number is clipped to
            the sublayers of a shallower stream, and is an error above those of the deepest one.
            When a stream has at least as many layers as blocks, boundaries fall between layers;
            the remainder goes to the last block. Or a mapping from patterns over the streams'
            names to any of these: the first that matches a stream counts, ``"auto"`` where none
            does; kept as pairs.
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
        sites: which sites get a mix, as glob patterns over the modules that read there and that
            the sublayer runs: ``"*.self_attn"`` or ``"!*.mlp"``, ``"model.layers[::2]"`` for every
            second layer (a slice, as of a Python list), ``"model.norm"`` for the last read. A site
            that is left out reads the plain residual sum, and the sources stay as they are.
            ``None`` gives all of them a mix. A pattern that matches no site is an error.
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

    num_blocks: Blocks | Mapping[str, Blocks] | tuple[tuple[str, Blocks], ...] = "auto"
    block_sublayers: int | None = None
    aggregate: Literal["sum", "mean"] = "sum"
    key_gain: bool = True
    eps: float = 1e-6
    streams: tuple[str, ...] | None = None
    sites: tuple[str, ...] | None = None
    delta_sources: bool = False

    def __post_init__(self) -> None:
        if self.block_sublayers is not None and self.num_blocks != "auto":
            raise ConfigError(
                f"num_blocks={self.num_blocks!r} and block_sublayers={self.block_sublayers} both "
                "say how long a block is; set only one of them."
            )
        if isinstance(self.num_blocks, Mapping | tuple):
            object.__setattr__(self, "num_blocks", _pairs(self.num_blocks))
        else:
            _check_number(self.num_blocks)
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
            object.__setattr__(self, "streams", _patterns("streams", self.streams))
        if self.sites is not None:
            object.__setattr__(self, "sites", _patterns("sites", self.sites))

    def to_json(self) -> dict[str, Any]:
        """The options as a dictionary of JSON values."""
        settings = asdict(self)
        if isinstance(self.num_blocks, tuple):
            settings["num_blocks"] = dict(self.num_blocks)
        return settings


def _pairs(num_blocks: Any) -> tuple[tuple[str, Blocks], ...]:
    try:
        pairs = tuple(dict(num_blocks).items())
    except (TypeError, ValueError):
        pairs = ()
    if not pairs or not all(isinstance(pattern, str) for pattern, _ in pairs):
        raise ConfigError(
            f"num_blocks={num_blocks!r} should map patterns over streams to numbers, as in "
            "{'encoder': 4, 'decoder': 'full'}."
        )
    for pattern, count in pairs:
        if pattern.startswith("!"):
            raise ConfigError(f"num_blocks gives no number to all but {pattern[1:]!r}; name them.")
        _check_number(count)
    return pairs


def _check_number(num_blocks: object) -> None:
    if num_blocks not in ("auto", "full") and not _is_positive_int(num_blocks):
        raise ConfigError(
            f"num_blocks must be 'auto', 'full' or a positive integer, not {num_blocks!r}."
        )


def _patterns(option: str, given: object) -> tuple[str, ...]:
    if isinstance(given, str):
        raise ConfigError(f"{option} takes a tuple of patterns; write {option}=({given!r},).")
    if not isinstance(given, Iterable) or isinstance(given, Mapping):
        raise ConfigError(f"{option} takes a tuple of patterns, not {given!r}.")
    patterns = tuple(given)
    if not patterns:
        each = option.removesuffix("s")
        raise ConfigError(f"{option}=() converts nothing; leave it out to convert every {each}.")
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f"{option} takes a tuple of patterns, not {given!r}.")
    return patterns


def _is_positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
