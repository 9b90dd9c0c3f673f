"""Stand-ins: tensors without data, whose only use is that a gradient finds its way back by them.

An operator may not return what it was given. Where its result would be an argument as it is, a sum
of one addend or a source that only passes by, it returns a stand-in for it, and whoever reads the
data reads the argument. A stand-in may also be passed as the third addend of a sum: it brings home
what earlier readers owe the first one, which then gets no gradient of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def stand_in(tensor: Tensor) -> Tensor:
    """A tensor like ``tensor`` with a single element of storage, to bring a gradient back."""
    return tensor.new_zeros(()).expand(tensor.shape)


def share(grad: Tensor | None, needed: Sequence[bool]) -> list[Tensor | None]:
    """One gradient for every addend; where there is a stand-in, for it instead of the first."""
    owed = [True] * len(needed) if len(needed) < 3 else [False, True, True]
    return [grad if n and o else None for n, o in zip(needed, owed, strict=True)]
