"""Cases in which every two sizes occur together: of sources, sites of a block, width and tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, product

from phase_cases import PhaseCase

# The sources of a case's blocks, one more from block to block: completing the first ones is most
# of what a block with few sites costs, and this shares it. Three sources, the fewest that have a
# phase 1, stand alone and so make the cheapest case of many sites.
RUNS = [range(1, 3), range(3, 4), *(range(n, min(n + 4, 35)) for n in range(4, 35, 4))]
# The limits on sites that a group of kernels serves are 12, 16 and 64; 65 is in SIZES.
SITES = range(1, 25)
WIDTHS = (48, 64, 96, 1000, 4096)
TOKENS = (1, 5, 257)

Pair = tuple[tuple[str, int], tuple[str, int]]


@dataclass(frozen=True)
class Sizes:
    """Blocks of as many ``sites`` each, the first over ``sources[0]`` sources."""

    sources: range
    sites: int
    width: int
    tokens: int

    def pairs(self) -> set[Pair]:
        """The sizes that occur together, each with the name of its axis."""
        rest = (("sites", self.sites), ("width", self.width), ("tokens", self.tokens))
        found: set[Pair] = set()
        for count in self.sources:
            found.update(combinations((("sources", count), *rest), 2))
        return found

    def case(self) -> PhaseCase:
        sites = (self.sites,) * len(self.sources)
        return PhaseCase(self.sources[0], sites, (self.tokens, self.width))


def pairwise(
    runs: Iterable[range], sites: Iterable[int], widths: Sequence[int], tokens: Sequence[int]
) -> list[Sizes]:
    """One case for each run of sources with each number of sites, the cheapest first.

    Each gets the width and tokens that add most pairs, among equals the widest: what is large
    occurs where there is little else to compute. Cases that have nothing to add are smallest.
    """
    smallest = (min(widths), min(tokens))
    shapes = sorted(product(widths, tokens), key=lambda shape: (-shape[0], shape[1]))
    covered: set[object] = set()
    chosen = []
    for run, count in sorted(product(runs, sites), key=lambda c: (sum(c[0]) * c[1], len(c[0]))):
        # What a shape adds: pairs of values, each with its place. One is the run with the count.
        added = {
            shape: set(combinations(enumerate((run, count, *shape)), 2)) - covered
            for shape in shapes
        }
        shape = max(shapes, key=lambda shape: len(added[shape]))
        if len(added[shape]) == 1:
            shape = smallest
        covered |= added[shape]
        chosen.append(Sizes(run, count, *shape))
    return chosen
