"""Models written for the tests: what people write by hand, and spellings that no library has."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CausalAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


def mlp(width: int, hidden: int | None = None) -> nn.Sequential:
    hidden = hidden or 2 * width
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class GPTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.attention = CausalAttention(width, heads)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class NanoGPT(nn.Module):
    """A small GPT with tied embeddings whose loss is computed inside when targets are given."""

    def __init__(
        self, vocabulary: int = 96, width: int = 32, heads: int = 4, layers: int = 4
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(64, width)
        self.dropout = nn.Dropout(0.1)
        self.blocks = nn.ModuleList(GPTBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.token_embedding.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        positions = torch.arange(idx.shape[1], device=idx.device)
        x = self.dropout(self.token_embedding(idx) + self.position_embedding(positions))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if targets is None:
            return self.head(x[:, [-1]]), None
        logits = self.head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class PreActivationBlock(nn.Module):
    """Norm and activation before each convolution; a new shape has a projected shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm_1 = nn.BatchNorm2d(channels_in)
        self.conv_1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm_2 = nn.BatchNorm2d(channels)
        self.conv_2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.projection: nn.Conv2d | None = None
        if stride != 1 or channels_in != channels:
            self.projection = nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.norm_1(x))
        shortcut = x if self.projection is None else self.projection(activated)
        y = self.conv_1(activated)
        y = self.conv_2(F.relu(self.norm_2(y)))
        return y + shortcut


class PreActivationResNet(nn.Module):
    def __init__(self, widths: tuple[int, ...] = (8, 16), blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        stages, channels = [], widths[0]
        for index, width in enumerate(widths):
            strides = [1 if index == 0 else 2] + [1] * (blocks - 1)
            stage = nn.Sequential()
            for stride in strides:
                stage.append(PreActivationBlock(channels, width, stride))
                channels = width
            stages.append(stage)
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stages(self.stem(x))))
        return self.head(x.mean((2, 3)))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    """Attention and MLP whose norms are modulated, and whose outputs are gated, by a condition."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = CausalAttention(width, heads)
        self.norm_2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = mlp(width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(condition).chunk(6, 1)
        x = x + gate_1.unsqueeze(1) * self.attention(modulate(self.norm_1(x), shift_1, scale_1))
        return x + gate_2.unsqueeze(1) * self.mlp(modulate(self.norm_2(x), shift_2, scale_2))


class DiT(nn.Module):
    """A diffusion transformer: noisy image, time and class label in, predicted noise out."""

    def __init__(self, size: int = 8, width: int = 32, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(4, width, 2, 2)
        self.positions = nn.Parameter(torch.randn(1, (size // 2) ** 2, width))
        self.time = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(10, width)
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.head = nn.Linear(width, 16)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        frequencies = torch.exp(-torch.arange(8, device=x.device, dtype=x.dtype))
        angles = time[:, None] * frequencies
        condition = self.time(torch.cat((angles.cos(), angles.sin()), 1)) + self.label(label)
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(condition).chunk(2, 1)
        return self.head(modulate(self.norm(x), shift, scale))


class TokenModel(nn.Module):
    """Embedding, blocks, final norm and head; the blocks are what a test is about."""

    def __init__(self, *blocks: nn.Module, width: int = 32, vocabulary: int = 96) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.embedding(idx)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class ParallelBlock(GPTBlock):
    """Both branches read the same state and are added one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm_1(x)) + self.mlp(self.norm_2(x))


class RightSkipBlock(GPTBlock):
    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(self.norm_1(x)) + x
        return self.mlp(self.norm_2(x)) + x


class AlphaBlock(GPTBlock):
    """Adds a multiple of each branch, as `torch.add`, as a method and with the factor inside."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.add(x, self.attention(self.norm_1(x)), alpha=2)
        x = x.add(self.mlp(self.norm_2(x)), alpha=0.5)
        return torch.add(x, self.mlp(x))


class LoRALinear(nn.Module):
    """A linear layer plus a low-rank update: a sum of two branches, not a residual addition."""

    def __init__(self, width_in: int, width_out: int, rank: int = 4) -> None:
        super().__init__()
        self.base = nn.Linear(width_in, width_out)
        self.down = nn.Linear(width_in, rank, bias=False)
        self.up = nn.Linear(rank, width_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.up(self.down(x))


class LoRABlock(GPTBlock):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.attention.qkv = LoRALinear(width, 3 * width)  # type: ignore[assignment]
        self.attention.out = LoRALinear(width, width)  # type: ignore[assignment]
        self.mlp = nn.Sequential(LoRALinear(width, width), nn.GELU(), LoRALinear(width, width))


class FourierBlock(nn.Module):
    """Tokens are mixed by a Fourier transform, which has no weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.fft.fft2(self.norm_1(x)).real / 4
        return x + self.mlp(self.norm_2(x))


class ShiftBlock(nn.Module):
    """Tokens are mixed by a shift and an element-wise gate: neither norm nor weight matrix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(width))
        self.norm = nn.LayerNorm(width)
        self.mlp = mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gate * F.pad(x, (0, 0, 1, -1))
        return x + self.mlp(self.norm(x))


class PoolingBlock(nn.Module):
    """Tokens of an image are mixed by the difference to their neighbourhood's average."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm_1 = nn.GroupNorm(1, channels)
        self.norm_2 = nn.GroupNorm(1, channels)
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 1), nn.GELU(), nn.Conv2d(2 * channels, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_1(x)
        x = x + (F.avg_pool2d(y, 3, 1, 1, count_include_pad=False) - y)
        return x + self.mlp(self.norm_2(x))


class InPlaceBlock(nn.Module):
    """The carrier itself is overwritten, then a branch that takes the carrier in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm_1 = nn.BatchNorm2d(channels)
        self.conv_1 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.norm_2 = nn.GroupNorm(2, channels)
        self.conv_2 = nn.Conv2d(channels, channels, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        # Half of x is a copy: autograd forbids overwriting what a norm has saved.
        x += self.conv_1(F.relu(self.norm_1(0.5 * x)))
        y = self.conv_2(F.relu(self.norm_2(x)))
        y += x
        return y


class ImageModel(nn.Module):
    """Stem, blocks, global average and head over an NCHW stream."""

    def __init__(self, *blocks: nn.Module, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, 2, 1)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.GroupNorm(1, channels)
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x))).mean((2, 3)))


class CarrierDropoutBlock(GPTBlock):
    """Dropout falls on the sum, so that the next state is not the last one plus a branch."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x + self.attention(self.norm_1(x)), 0.1, self.training)
        return F.dropout(x + self.mlp(self.norm_2(x)), 0.1, self.training)


class NarrowingBlock(GPTBlock):
    """Each sum is rounded to bfloat16 and widened again."""

    def forward(self, x: Tensor) -> Tensor:
        x = (x + self.attention(self.norm_1(x))).to(torch.bfloat16).to(x.dtype)
        return (x + self.mlp(self.norm_2(x))).to(torch.bfloat16).to(x.dtype)


class PlainBlock(GPTBlock):
    """No residual addition: positions, a bias and a polynomial are all that is added."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(self.norm_1(x))
        x = x + 0.1 * x**3
        return self.mlp(self.norm_2(x)) + self.norm_1.bias
