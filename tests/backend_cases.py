"""Models of which every test of the backend compiles one, beside those of the zoo.

``small_gpt`` has what a decoder has, and compiles in a third of the time that ``llama`` takes. The
tokens of ``transposed_tokens`` are an image, so that its stream does not lie row by row.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from handwritten_models import GPTBlock, TokenModel
from zoo_case import Case


class PositionMixer(nn.Module):
    """Mixes channels, and then positions, which it takes for rows by a view of the stream."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.channels = nn.Linear(width, width)
        self.positions = nn.Linear(length, length)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.channels(self.norm(x)))
        rows = as_rows(x)
        return x + torch.tanh(self.positions(rows)).view(x.mT.shape).mT


class TransposedTokens(nn.Module):
    def __init__(self, width: int = 8, layers: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 2, 2)
        self.blocks = nn.ModuleList(PositionMixer(width, 16) for _ in range(layers))
        self.head = nn.Linear(16, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(as_rows(x))


def as_rows(tokens: Tensor) -> Tensor:
    """One row a channel. A view merges batch and channels, which needs transposed tokens."""
    return tokens.transpose(1, 2).view(-1, tokens.shape[1])


CASES = {
    case.name: case
    for case in (
        Case(
            name="small_gpt",
            make_model=lambda: TokenModel(*(GPTBlock(16, 2) for _ in range(3)), width=16),
            make_inputs=lambda: ((torch.randint(96, (2, 6)),), {}),
            residual_additions=6,
            depths=(6,),
            sublayers=(6,),
            counted_in="GPTBlock.forward",
        ),
        Case(
            name="transposed_tokens",
            make_model=TransposedTokens,
            make_inputs=lambda: ((torch.randn(2, 3, 8, 8),), {}),
            residual_additions=8,
            depths=(8,),
            sublayers=(8,),
            counted_in="TransposedTokens.forward",
        ),
    )
}
