"""Compares a share of the pairwise sizes with the specification; a JSON line of errors for each.

Its arguments are the share, how many there are, and the dtype. It runs in a process of its own for
the reason that interpreted_worker.py has.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch
from interpreted_worker import compare, prepare
from pairwise_sizes import RUNS, SITES, TOKENS, WIDTHS, pairwise


def main() -> None:
    prepare()
    share, shares, dtype = int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3])
    for sizes in pairwise(RUNS, SITES, WIDTHS, TOKENS)[share::shares]:
        errors = asdict(compare(sizes.case(), dtype))
        print(json.dumps({"sizes": str(sizes), **errors}), flush=True)


if __name__ == "__main__":
    main()
