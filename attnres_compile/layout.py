"""What a rewrite has to know of an owner's streams, as text that travels inside a graph."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from attnres_compile.passes.rewrite_residuals import MixLayout


@dataclass(frozen=True)
class StreamLayout:
    """One stream, by identities relative to its owner.

    Attributes:
        name: of the stream, for messages.
        additions: path below the owner and ordinal of every residual addition.
        sites: state positions of the sites that have a mix, with a gain or without.
        mix: blocks and form of the mixes.
        gains: whether each of those sites has a key gain.
        left_out: state positions of the sites that read the plain residual sum.
    """

    name: str
    additions: tuple[tuple[str, int], ...]
    sites: tuple[int, ...]
    gains: bool
    mix: MixLayout
    left_out: tuple[int, ...]


@dataclass(frozen=True)
class OwnerLayout:
    """The streams of one owner, in the order of its declared parameters.

    Attributes:
        streams: their layouts.
        methods: names of the owner's methods through which its forward reaches the additions.
        layers: paths, below the owner, of the modules that hold additions.
        delta_sources: whether they were found among the streams with delta sources.
    """

    streams: tuple[StreamLayout, ...]
    methods: tuple[str, ...]
    layers: tuple[str, ...]
    delta_sources: bool = False

    def encode(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    def decode(text: str) -> OwnerLayout:
        """From `encode`'s JSON."""
        data = json.loads(text)
        streams = tuple(_stream(stream) for stream in data["streams"])
        return OwnerLayout(
            streams, tuple(data["methods"]), tuple(data["layers"]), bool(data["delta_sources"])
        )


def _stream(data: dict[str, object]) -> StreamLayout:
    additions = data["additions"]
    sites = data["sites"]
    left_out = data["left_out"]
    mix = data["mix"]
    assert isinstance(additions, list)
    assert isinstance(sites, list)
    assert isinstance(left_out, list)
    assert isinstance(mix, dict)
    return StreamLayout(
        name=str(data["name"]),
        additions=tuple((str(path), int(ordinal)) for path, ordinal in additions),
        sites=tuple(int(site) for site in sites),
        gains=bool(data["gains"]),
        mix=MixLayout(
            block_sublayers=tuple(mix["block_sublayers"]),
            sums=bool(mix["sums"]),
            eps=float(mix["eps"]),
            channel_dim=int(mix["channel_dim"]),
        ),
        left_out=tuple(int(site) for site in left_out),
    )
