"""Checkpointed regions: opened for the analysis, and put back so that they still save memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from attnres_compile.passes.find_streams import find_streams
from attnres_compile.passes.inline_checkpoints import REGION, inline_checkpoints
from attnres_compile.passes.outline_checkpoints import outline_checkpoints, recompute_tags
from passes_helpers import WIDTH, depths, tokens
from rewriting_helpers import MIX, rewrite_module
from tolerances import assert_matches

TAG = torch.ops.higher_order.tag_activation_checkpoint


class Block(nn.Module):
    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(torch.tanh(self.up(self.norm(x)))))


class Model(nn.Module):
    """Blocks, all, none or every second one of which is checkpointed."""

    def __init__(self, *blocks: nn.Module, every: int = 1, **options: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.last = nn.Linear(WIDTH, WIDTH)
        self.every = every
        self.options = {"use_reentrant": False, **options}

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            if self.every and number % self.every == 0:
                x = checkpoint(block, x, **self.options)
            else:
                x = block(x)
        return self.last(x)


def captured(model: nn.Module, run: Callable[[fx.GraphModule], Any], x: Tensor) -> Tensor:
    """A model compiled by a backend that hands Dynamo's graph to `run` for a callable."""

    def backend(module: fx.GraphModule, inputs: list[Tensor]) -> Any:
        return run(module)

    result: Tensor = torch.compile(model, backend=backend, fullgraph=True)(x)
    return result


def opened(model: nn.Module, x: Tensor) -> fx.GraphModule:
    found: list[fx.GraphModule] = []

    def run(module: fx.GraphModule) -> Any:
        inline_checkpoints(module)
        found.append(module)
        return module.forward

    captured(model, run, x)
    return found[0]


def regions(module: fx.GraphModule) -> list[int]:
    """The regions in graph order, one entry per run of nodes."""
    found = [node.meta[REGION].index for node in module.graph.nodes if REGION in node.meta]
    return [index for i, index in enumerate(found) if i == 0 or found[i - 1] != index]


def test_additions_inside_regions_are_seen_once_they_are_inlined() -> None:
    counts: list[list[int]] = []

    def run(module: fx.GraphModule) -> Any:
        counts.append(depths(find_streams(module.graph)))
        assert inline_checkpoints(module) == 3
        counts.append(depths(find_streams(module.graph)))
        return module.forward

    model = Model(Block(), Block(), Block())
    x = tokens()
    result = captured(model, run, x)
    assert counts == [[], [3]]
    assert_matches(result, model(x), name="output")


def test_nodes_remember_their_region() -> None:
    module = opened(Model(Block(), Block(), Block(), Block(), every=2), tokens())
    assert regions(module) == [0, 1]
    assert not [node for node in module.graph.nodes if node.target is TAG]
    assert not [node for node in module.graph.nodes if node.op == "get_attr" and not node.users]
    outside = [n for n in module.graph.nodes if n.op.startswith("call") and REGION not in n.meta]
    assert len(outside) > 8


def test_a_graph_without_regions_is_left_alone() -> None:
    module = opened(Model(Block(), Block(), every=0), tokens())
    before = str(module.graph)
    assert inline_checkpoints(module) == 0
    assert outline_checkpoints(module) is module
    assert str(module.graph) == before


def test_a_region_inside_a_region_joins_the_outer_one() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Block()

        def forward(self, x: Tensor) -> Tensor:
            x = x + torch.tanh(x)
            return checkpoint(self.inner, x, use_reentrant=False)

    module = opened(Model(Outer(), Outer()), tokens())
    assert regions(module) == [0, 1]
    assert not [node for node in module.graph.nodes if node.target is TAG]


def test_a_region_keeps_its_options() -> None:
    module = opened(Model(Block(), preserve_rng_state=False), tokens())
    (region,) = {node.meta[REGION] for node in module.graph.nodes if REGION in node.meta}
    assert dict(region.options)["preserve_rng_state"] is False


def saved_bytes(run: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Bytes of activations that a run keeps for its backward pass, and its result."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return sum(kept.values()), result


def executed(model: nn.Module, x: Tensor) -> tuple[int, Tensor, list[Tensor]]:
    """Saved bytes, output and gradients of a model whose regions were opened and put back."""

    def run(module: fx.GraphModule) -> Any:
        inline_checkpoints(module)
        return outline_checkpoints(module).forward

    def call() -> Tensor:
        torch.manual_seed(3)
        return captured(model, run, x)

    size, result = saved_bytes(call)
    gradients = torch.autograd.grad((result**2).sum(), list(model.parameters()))
    return size, result.detach(), list(gradients)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_regions_put_back_save_memory_and_compute_the_same(dropout: float) -> None:
    blocks = [Block(dropout=dropout) for _ in range(4)]
    x = torch.randn(8, 16, WIDTH)
    model = Model(*blocks).train()
    size, result, gradients = executed(model, x)
    torch._dynamo.reset()
    model.every = 0
    plain_size, plain, plain_gradients = executed(model, x)
    assert_matches(result, plain, name="output")
    for number, gradient in enumerate(gradients):
        assert_matches(gradient, plain_gradients[number], name=f"gradient {number}", factor=5)
    # What is kept is the input of each region, and not four times its width.
    assert size < 0.4 * plain_size


def test_mixes_stand_in_the_region_of_their_state() -> None:
    model = Model(*(Block() for _ in range(3)))
    x = torch.randn(8, 16, WIDTH)
    expected_size, expected, _ = executed(model, x)
    torch._dynamo.reset()

    def run(module: fx.GraphModule) -> Any:
        inline_checkpoints(module)
        rewritten = rewrite_module(module)
        assert rewritten.inserted["mix"] == 3
        regions = [n.meta[REGION].index for n in module.graph.nodes if n.target is MIX]
        assert regions == [0, 1, 2]
        return outline_checkpoints(module).forward

    size, result = saved_bytes(lambda: captured(model, run, x))
    assert_matches(result, expected, name="output")
    # A sublayer's output and its mix are kept where the state was, and nothing inside a region.
    assert size <= 2 * expected_size


def test_only_some_regions_save_some_memory() -> None:
    blocks = [Block() for _ in range(4)]
    x = torch.randn(8, 16, WIDTH)
    sizes = []
    for every in (1, 2, 0):
        torch._dynamo.reset()
        sizes.append(executed(Model(*blocks, every=every), x)[0])
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3


def test_recompute_tags_for_inductor() -> None:
    module = opened(Model(Block(), Block(), every=2), tokens())
    recompute_tags(module.graph)
    for node in module.graph.nodes:
        if REGION in node.meta:
            assert node.meta["recompute"] is CheckpointPolicy.PREFER_RECOMPUTE
            assert node.meta["ac_graph_id"] == node.meta[REGION].index
        else:
            assert "recompute" not in node.meta
