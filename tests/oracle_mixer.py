"""Block AttnRes written down by hand: the block layout and the mix, straight from the formula.

Nothing here imports the package. The oracles of ``oracles.py`` run their models' branches and
leave everything that is Attention Residuals to ``BlockMixer``, which is meant to be read beside
the paper rather than to be fast:

    h_k = c * sum_i alpha_i s_i      alpha = softmax_i( w_k . (gain_k * RMSNorm(s_i)) )

over the sources s_i = root, sums of the completed blocks, partial sum of the block in progress.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Aggregate = Literal["sum", "mean"]
SiteKey = tuple[str, int]
"""A stream's name and the number of residual additions that precede the read."""


class SiteParameters(NamedTuple):
    """What one site learns: a query [D] and the gain [D] of its key norm."""

    query: Tensor
    gain: Tensor


@dataclass(frozen=True)
class OracleStream:
    """A residual stream as counted by hand in the model's source."""

    name: str
    channels: int
    layers: int
    sublayers_per_layer: int

    @property
    def sublayers(self) -> int:
        return self.layers * self.sublayers_per_layer


@dataclass(frozen=True)
class Mixing:
    """Everything that turns a plain forward pass into a Block AttnRes one."""

    sites: Mapping[SiteKey, SiteParameters]
    num_blocks: int | Literal["auto"] = "auto"
    block_sublayers: int | None = None
    aggregate: Aggregate = "sum"
    eps: float = 1e-6
    left_out: frozenset[SiteKey] = frozenset()  # these read x_k as the plain model has it

    def block_sizes(self, stream: OracleStream) -> list[int]:
        """The number of sublayers in each block of this stream."""
        if self.block_sublayers is not None:
            size = self.block_sublayers
            full_blocks, rest = divmod(stream.sublayers, size)
            return [size] * full_blocks + ([rest] if rest else [])

        wanted = 8 if self.num_blocks == "auto" else self.num_blocks
        num_blocks = min(wanted, stream.sublayers)
        if stream.layers >= num_blocks:
            size = stream.layers // num_blocks * stream.sublayers_per_layer
        else:
            size = stream.sublayers // num_blocks
        sizes = [size] * num_blocks
        sizes[-1] += stream.sublayers - sum(sizes)
        return sizes


@dataclass(frozen=True)
class Read:
    """What one site saw: for tests that look inside an oracle."""

    sources: tuple[Tensor, ...]
    ordinary_sum: Tensor
    mixed: Tensor


@dataclass
class OracleResult:
    """The tensors a model returns, by the names of its output, and every read on the way."""

    outputs: dict[str, Tensor] = field(default_factory=dict)
    reads: dict[SiteKey, Read] = field(default_factory=dict)


class BlockMixer:
    """One residual stream in flight: ``read`` it, compute a branch, ``add`` the branch, repeat.

    ``depth`` counts residual additions. A sublayer is a run of additions with no read between
    them, so a block can only be completed by the read that follows its last sublayer.
    """

    def __init__(
        self,
        stream: OracleStream,
        root: Tensor,
        mixing: Mixing,
        reads: dict[SiteKey, Read],
        *,
        channel_dim: int = -1,
    ) -> None:
        assert root.shape[channel_dim] == stream.channels
        self.stream = stream
        self.mixing = mixing
        self.channel_dim = channel_dim
        self.depth = 0
        self._reads = reads
        self._block_sizes = mixing.block_sizes(stream)
        self._completed = [root]
        self._partial: Tensor | None = None
        self._sublayers_in_block = 0
        self._added_since_read = False
        self._ordinary_sum = root

    def add(self, branch: Tensor) -> None:
        """The residual addition: what the plain model writes as ``x = x + branch``."""
        branch = branch.to(self._ordinary_sum.dtype)
        self._partial = branch if self._partial is None else self._partial + branch
        self._ordinary_sum = self._ordinary_sum + branch
        self._added_since_read = True
        self.depth += 1

    def read(self) -> Tensor:
        """The mix h_k that every reader of depth k reads in place of x_k."""
        if self._added_since_read:
            self._end_sublayer()
        sources = list(self._completed)
        if self._partial is not None:
            sources.append(self._partial)

        key = (self.stream.name, self.depth)
        if len(sources) == 1:
            mixed = sources[0]
        elif key in self.mixing.left_out:
            mixed = self._ordinary_sum
        else:
            mixed = mix(
                sources,
                self.mixing.sites[key],
                aggregate=self.mixing.aggregate,
                eps=self.mixing.eps,
                channel_dim=self.channel_dim,
            )
        self._reads[key] = Read(tuple(sources), self._ordinary_sum, mixed)
        return mixed

    def _end_sublayer(self) -> None:
        self._added_since_read = False
        self._sublayers_in_block += 1
        current_block = len(self._completed) - 1  # the first completed source is the root
        if self._sublayers_in_block == self._block_sizes[current_block]:
            assert self._partial is not None
            self._completed.append(self._partial)
            self._partial = None
            self._sublayers_in_block = 0


def mix(
    sources: list[Tensor],
    site: SiteParameters,
    *,
    aggregate: Aggregate,
    eps: float,
    channel_dim: int = -1,
) -> Tensor:
    """Softmax-weighted sum of the sources, in float32 (float64 for float64 sources)."""
    dtype = torch.float64 if sources[0].dtype == torch.float64 else torch.float32
    values = [source.to(dtype) for source in sources]

    # a vector over the channels, shaped so that it broadcasts over all other dimensions
    vector_shape = [1] * values[0].ndim
    vector_shape[channel_dim] = -1
    query = site.query.to(dtype).reshape(vector_shape)
    gain = site.gain.to(dtype).reshape(vector_shape)

    scores = []
    for value in values:
        mean_square = value.square().mean(channel_dim, keepdim=True)
        normed = value / torch.sqrt(mean_square + eps)
        scores.append((query * (gain * normed)).sum(channel_dim, keepdim=True))
    weights = torch.softmax(torch.stack(scores), dim=0)

    mixed = torch.zeros_like(values[0])
    for weight, value in zip(weights, values, strict=True):
        mixed = mixed + weight * value
    if aggregate == "sum":
        mixed = len(values) * mixed
    return mixed.to(sources[0].dtype)
