"""The identity of a residual addition: the module it stands in, and its ordinal there.

It is the same in every capture of a model, in train and eval, prefill and decode, by Dynamo and by
torch.export. Ordinals count the additions of all streams found inside one call of the owner, in
graph order, per module path.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import fx

from attnres_compile.passes.graph_values import module_path
from attnres_compile.passes.streams import ResidualStream

Identity = tuple[str, int]


def identify_additions(streams: Iterable[ResidualStream]) -> dict[fx.Node, Identity]:
    """Path and ordinal of every residual addition of streams inside one call of one owner."""
    nodes = sorted(addition.node for stream in streams for addition in stream.additions)
    seen: Counter[str] = Counter()
    identities = {}
    for node in nodes:
        path = module_path(node)
        identities[node] = (path, seen[path])
        seen[path] += 1
    return identities
