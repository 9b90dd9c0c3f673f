"""A converted model in DistributedDataParallel: two gloo processes, several gradient buckets.

Under DDP, Dynamo cuts graphs at bucket boundaries, so that a rewrite sees no whole stream.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from conversions import converted_tower, error, tower_inputs, tower_oracle

RANKS = 2
BUCKET = 500  # bytes; a layer of a tower has 352
SENTENCE = "stream 'layers': the plan has 4 residual additions"


def train(rank: int, folder: str) -> None:
    """One process: its share of the batch, and what it saw of outputs and averaged gradients."""
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    converted = converted_tower()
    vars(distributed)["_DEFAULT_FIRST_BUCKET_BYTES"] = BUCKET // 2  # where Dynamo cuts first
    parallel = DistributedDataParallel(
        converted,
        bucket_cap_mb=BUCKET / 2**20,
        find_unused_parameters=True,  # otherwise the first iteration has a single bucket
    )
    x = tower_inputs().chunk(RANKS)[rank]
    for _ in range(2):
        converted.zero_grad()
        output = parallel(x)
        loss_of(output).backward()
    result: dict[str, Any] = {
        "output": output.detach(),
        "gradients": {name: p.grad for name, p in converted.named_parameters()},
        "buckets": parallel._get_ddp_logging_data()["bucket_sizes"],
        "compiled": outer_compile(parallel, x),
    }
    torch.save(result, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def outer_compile(parallel: nn.Module, x: Tensor) -> str:
    """What an outer torch.compile around DDP says, where the graph is cut."""
    try:
        torch.compile(parallel, backend="attnres")(x)
    except Exception as error:
        return str(error)
    return "no error"


def loss_of(output: Tensor) -> Tensor:
    return (output * torch.linspace(-1, 1, output.shape[1])).square().mean()


@pytest.mark.slow
def test_several_buckets(tmp_path: Path) -> None:
    multiprocessing.spawn(train, args=(str(tmp_path),), nprocs=RANKS)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]

    alone = converted_tower()
    x = tower_inputs()
    expected = tower_oracle(alone, x)
    outputs = torch.cat([result["output"] for result in results])
    assert error(outputs, expected) < 1e-6

    loss_of(alone(x)).backward()
    for result in results:
        assert len(result["buckets"].split(",")) > 3
        for name, parameter in alone.named_parameters():
            assert parameter.grad is not None
            assert error(result["gradients"][name], parameter.grad) < 1e-5, name
        assert SENTENCE in result["compiled"]
