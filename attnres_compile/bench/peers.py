"""Rows per token that other implementations of a block move, by formula.

One row is D elements of the stream's dtype. A block has S sites and n completed sources; its first
site reads n sources and the others n + 1. Counted is everything between the sublayers' outputs and
the next sublayers' normed inputs, so that what a peer does not fuse (stacking, residual additions,
norms, autograd's additions of gradients) is added to its kernels.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Peer:
    """One implementation.

    Attributes:
        name: for people.
        forward_rows: rows per token of a block, forward.
        backward_rows: the same, backward; ``None`` where there is no backward pass.
    """

    name: str
    forward_rows: int
    backward_rows: int | None


def peers(n: int, s: int) -> list[Peer]:
    """All of them, for a block of ``s`` sites over ``n`` completed sources.

    Example:
        >>> [(p.forward_rows, p.backward_rows) for p in peers(8, 6) if p.name == "Liger"]
        [(245, 342)]
    """
    reads = n + (s - 1) * (n + 1)
    unfused = 3 * (s - 1) + 2 * s  # residual additions, and the norms
    return [
        Peer("Liger", 4 * reads + s + unfused, 6 * reads + 4 * s),
        Peer("fla, checkpoint 1, output norm", s * n + 5 * s - 4, 6 * reads + 9 * s),
        Peer("fla, checkpoint 0, output norm", s * n + 6 * s - 4, 5 * reads + 10 * s),
        Peer("fast-attnres, list", reads + 3 * s + unfused, 5 * reads + 10 * s),
        Peer("vLLM and aiter, gate", s * n + 4 * s, None),
        Peer("catswe, two phases", n + 9 * s - 4, 3 * n + 23 * s - 7),
        Peer("minimum of one pass", s * n + 4 * s - 2, 3 * n * s + 5 * s - 3),
        Peer("minimum of two phases", n + 6 * s - 4, 3 * n + 7 * s - 6),
    ]
