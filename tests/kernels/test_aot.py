"""What compiled kernels use on four targets, with no GPU: no spill, rows 16 bytes wide."""

import pytest
import torch

from attnres_compile.kernels import aot

ROW_KERNELS = ("site", "complete", "phase 1")


def check(width: int, sites: int, targets: tuple[str, ...], only: str = "") -> None:
    kernels = aot.kernels_of_a_block(sources=9, sites=sites, width=width, dtype=torch.bfloat16)
    problems = []
    for name, kernel in kernels.items():
        if only not in name:
            continue
        for target in targets:
            found = aot.compile_for(kernel, target, name)
            narrow = {size for size in (*found.loads, *found.stores) if size not in (4, 16)}
            rows = any(p.kind == "row" for p in kernel.parameters)
            if (
                found.spills
                or narrow
                or (rows and not (found.loads.get(16) and found.stores.get(16)))
            ):
                problems.append(found)
    assert not problems


def test_one_kernel_for_all_targets() -> None:
    check(1536, 2, aot.TARGETS, only="site backward")


@pytest.mark.slow
@pytest.mark.parametrize("sites", [6, 12])
@pytest.mark.parametrize("width", [1024, 1536, 4096, 5120, 7168, 8192])
def test_no_spill_and_wide_accesses(width: int, sites: int) -> None:
    check(width, sites, aot.TARGETS)
