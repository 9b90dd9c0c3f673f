"""More hand-written models: nested and crossing streams, shared layers, unusual reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handwritten_models import CausalAttention, GPTBlock, ImageModel, TokenModel, mlp


class ResidualGroup(nn.Module):
    """Residual blocks inside an outer skip, as in networks for image restoration."""

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(1, channels), nn.Conv2d(channels, channels, 3, 1, 1))
            for _ in range(blocks)
        )
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for block in self.blocks:
            y = y + block(y)
        return x + self.conv(y)


class Looped(nn.Module):
    """One block, called several times."""

    def __init__(self, width: int = 32, loops: int = 3) -> None:
        super().__init__()
        self.block = GPTBlock(width, 4)
        self.loops = loops

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.loops):
            x = self.block(x)
        return x


class PositionedBlock(GPTBlock):
    """Adds something to the carrier that has the stream's shape but does not depend on it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.positions = nn.Embedding(64, width)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        return super().forward(x) + self.positions(positions)


class AllStates(TokenModel):
    """Returns every state as well, and pools them in the head."""

    def forward(self, idx: Tensor) -> dict[str, Tensor | tuple[Tensor, ...]]:  # type: ignore[override]
        states = [self.embedding(idx)]
        for block in self.blocks:
            states.append(block(states[-1]))
        pooled = torch.stack(states).mean(0) + self.norm(states[-1])
        return {"logits": self.head(pooled), "states": tuple(states)}


class ReZeroBlock(nn.Module):
    """No norm anywhere: each branch reads the state as it is and has one learnable scale."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = CausalAttention(width, heads)
        self.mlp = mlp(width)
        self.scales = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scales[0] * self.attention(x)
        return x + self.scales[1] * self.mlp(x)


class ScaledCarrierBlock(GPTBlock):
    """The state is damped before each branch is added to it."""

    def forward(self, x: Tensor) -> Tensor:
        x = 0.9 * x + self.attention(self.norm_1(x))
        return 0.9 * x + self.mlp(self.norm_2(x))


class InPlaceAlias(ImageModel):
    """Keeps a name for the root, which the first addition then overwrites."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        kept = x
        x = self.blocks(x)
        return self.head((self.norm(x) + F.relu(kept)).mean((2, 3)))


class JointBlock(nn.Module):
    """Two streams of equal shape that attend to each other, each with its own residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.attention = CausalAttention(width, heads)
        self.mlps = nn.ModuleList(mlp(width) for _ in range(2))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        joint = torch.cat((self.norms[0](image), self.norms[1](text)), 1)
        to_image, to_text = self.attention(joint).split((image.shape[1], text.shape[1]), 1)
        image, text = image + to_image, to_text + text
        image = image + self.mlps[0](self.norms[2](image))
        text = self.mlps[1](self.norms[3](text)) + text
        return image, text


class JointModel(nn.Module):
    """Two streams side by side, then one over both."""

    def __init__(self, width: int = 32, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(96, width) for _ in range(2))
        self.joint = nn.ModuleList(JointBlock(width, heads) for _ in range(layers))
        self.single = nn.ModuleList(GPTBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        x, y = self.embeddings[0](image), self.embeddings[1](text)
        for block in self.joint:
            x, y = block(x, y)
        x = torch.cat((x, y), 1)
        for block in self.single:
            x = block(x)
        return self.norm(x)
