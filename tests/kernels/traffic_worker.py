"""Prints, as JSON, the rows per token that a block loads and stores in the interpreter.

Triton reads TRITON_INTERPRET when it is imported, so test_traffic.py runs this in its own process.
"""

import json
import sys

import torch
from torch import Tensor

from attnres_compile.kernels import phases
from attnres_compile.kernels.traffic import Traffic, count_traffic

COMPLETED = 8
EPS = 1e-6


def leaf(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size).to(dtype).requires_grad_()


def run_block(sites: int, width: int, tokens: int, dtype: torch.dtype) -> dict[str, Traffic]:
    """One block over completed sources: from its branches to its normed mixes and its sum."""
    sources = [leaf(tokens, width, dtype=dtype).detach() for _ in range(COMPLETED)]
    carriers = [leaf(tokens, width, dtype=dtype) for _ in range(COMPLETED)]
    logits = [leaf(sites, tokens) for _ in range(COMPLETED)]
    branches = [leaf(tokens, width, dtype=dtype) for _ in range(sites)]
    queries = [leaf(width) for _ in range(sites)]
    weights = [leaf(width, dtype=dtype) for _ in range(sites)]
    later = leaf(sites, width)

    with count_traffic() as forward:
        mixes, stacked, carriers_out, _ = phases.phase1(sources, carriers, logits, -1, "triton")
        statistics = stacked.unbind()
        addends: list[Tensor] = []
        outputs: list[Tensor] = []
        for j in range(sites):
            site = (mixes[j], statistics[j], [], addends, queries[j], EPS, 9.0)
            norm = ("rms", weights[j], None, EPS, None, False, -1, "triton")
            partial, _, normed, _ = phases.phase2(*site, *norm)
            outputs.append(normed)
            branch = branches[j]
            addends = {0: [branch], 1: [*addends, branch, partial]}.get(j, [partial, branch])
        source, new_logits, _ = phases.complete(addends, later, EPS, -1, "triton")

    outputs += [source, new_logits, *carriers_out]
    inputs = [*carriers, *logits, *branches, *queries, *weights, later]
    grads = [torch.randn(output.shape).to(output.dtype) for output in outputs]
    with count_traffic() as backward:
        torch.autograd.grad(outputs, inputs, grads)
    return {"forward": forward, "backward": backward}


def main() -> None:
    sites, width, tokens, dtype = sys.argv[1:]
    stream = getattr(torch, dtype)
    row = int(width) * stream.itemsize * int(tokens)
    found = {}
    for name, traffic in run_block(int(sites), int(width), int(tokens), stream).items():
        kinds = {"row", "statistic", "vector"}
        found[name] = {kind: traffic.bytes(kind) / row for kind in kinds}
        found[name]["kernels"] = {k: b / row for k, b in traffic.by_kernel("row").items()}
        found[name]["launches"] = dict(traffic.launches)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
