"""Of equal blocks in a row two stay, and a model that needs what was cut keeps it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shallow import depth_of_repeats, make_shallow


class Block(nn.Module):
    def __init__(self, width: int = 4, *, more: bool = False) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, width)
        self.gate = nn.Linear(4, 4) if more else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.gate(self.norm(x))))


class Stages(nn.Module):
    def __init__(self, *stages: nn.Module, needs: int | None = None) -> None:
        super().__init__()
        self.stages, self.needs = nn.ModuleList(stages), needs

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            blocks = list(stage.children())
            if self.needs is not None:
                x = x + blocks[self.needs](x)
            for block in blocks:
                x = block(x)
        return x


def kept(model: nn.Module) -> int:
    return make_shallow(model, lambda: model(torch.ones(2, 4)))


def test_two_equal_blocks_stay() -> None:
    model = Stages(nn.Sequential(*(Block() for _ in range(6))), nn.ModuleList([Block(), Block()]))
    first = model.stages[0][0]
    assert kept(model) == 4
    assert [list(stage._modules) for stage in model.stages] == [["0", "1"], ["0", "1"]]
    assert model.stages[0][0] is first


def test_unequal_blocks_stay() -> None:
    others = [Block(more=True), *(Block() for _ in range(3)), Block(more=True)]
    model = Stages(nn.Sequential(*others))
    assert kept(model) == 1
    assert [type(block.gate) for block in model.stages[0]] == [
        nn.Linear, nn.Identity, nn.Identity, nn.Linear
    ]  # fmt: skip


def test_two_kinds_that_take_turns() -> None:
    model = Stages(nn.Sequential(*(Block(more=bool(i % 2)) for i in range(9))))
    assert kept(model) == 5
    assert [type(block.gate) for block in model.stages[0]] == [nn.Identity, nn.Linear] * 2


def test_single_layers_stay() -> None:
    """With their norms or without: what is made of them may go into one concatenation."""
    model = Stages(nn.Sequential(*(nn.Linear(4, 4) for _ in range(5))))
    assert kept(model) == 0
    pairs = [nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(5)]
    assert kept(Stages(nn.Sequential(*pairs))) == 0
    assert depth_of_repeats(Stages(nn.Sequential(*pairs))) is None


def test_a_cut_that_a_model_does_not_survive_is_undone() -> None:
    deep = nn.ModuleList(Block() for _ in range(5))
    model = Stages(deep, needs=4)
    weights = list(model.state_dict())
    assert kept(model) == 0
    assert list(model.state_dict()) == weights
    model = Stages(nn.Sequential(nn.Sequential(*(Block() for _ in range(4))), Block()), needs=1)
    assert kept(model) == 2  # the inner list alone is cut


def test_repeats() -> None:
    """In the list of stages stand lists of blocks."""
    assert depth_of_repeats(Stages(nn.Sequential(Block(more=True), Block(), Block()))) == 2
    turns = nn.Sequential(*(Block(more=bool(i % 2)) for i in range(4)))
    assert depth_of_repeats(Stages(turns)) == 2
    others = nn.Sequential(Block(), Block(more=True), Block())
    assert depth_of_repeats(Stages(others)) is None
    single = nn.Sequential(Block()), nn.Sequential(Block(), Block(8))
    assert depth_of_repeats(Stages(*single)) is None
    assert depth_of_repeats(Stages(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))) is None


def test_repeats_inside_a_block_are_deeper_than_those_of_blocks() -> None:
    """What equal parts in a list of its own make of a block, one concatenation may take."""
    inner = nn.Sequential(Block(more=True), nn.Sequential(Block(), Block()))
    assert depth_of_repeats(Stages(inner)) == 3
    assert depth_of_repeats(Stages(inner, nn.Sequential(Block(), Block()))) == 2
    assert depth_of_repeats(nn.Sequential(Block(), Block())) == 1
