"""The modules that random residual networks are made of, one for each step of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from random_recipes import Absorb, Residual

BATCH, LENGTH, WIDTH = 2, 4, 8


def _flat(x: Tensor) -> Tensor:
    return x.view(-1, WIDTH)


def _after(_statement: Tensor, name: Tensor) -> Tensor:
    return name


_SPELLED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "left": lambda skip, branch, scale: skip + branch,
    "right": lambda skip, branch, scale: branch + skip,
    "function": lambda skip, branch, scale: torch.add(branch, skip),
    "method": lambda skip, branch, scale: skip.add(branch),
    "alpha": lambda skip, branch, scale: torch.add(skip, branch, alpha=0.5),
    "subtracted": lambda skip, branch, scale: skip - branch,
    "product": lambda skip, branch, scale: torch.addcmul(skip, branch.type_as(skip), scale),
    "flattened": lambda skip, branch, scale: (_flat(branch) + _flat(skip)).view(BATCH, LENGTH, -1),
    "in place": lambda skip, branch, scale: skip.add_(branch),
    "statement": lambda skip, branch, scale: _after(skip.add_(branch), skip),
    "statement on a view": lambda s, branch, scale: _after(_flat(s).add_(_flat(branch)), s),
    "subtracted statement": lambda skip, branch, scale: _after(skip.sub_(branch), skip),
}
_CARRIED: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "copied": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "cast": lambda x: x.type_as(x),
    "widened": lambda x: x.double(),
    "viewed": lambda x: x.reshape(-1, WIDTH).view(BATCH, LENGTH, WIDTH),
    "turned": lambda x: x.transpose(0, 2).permute(2, 1, 0),
    "unsqueezed": lambda x: x.unsqueeze(0).squeeze(0),
}


class Sum(nn.Module):
    """One residual addition; where it stands in the network says which."""

    def __init__(self, label: int, spelling: str, carrier: str) -> None:
        super().__init__()
        self.label, self.spelling, self.carrier = label, spelling, carrier
        self.register_buffer("scale", torch.rand(WIDTH).double())

    def forward(self, skip: Tensor, branch: Tensor) -> Tensor:
        skip = _CARRIED[self.carrier](skip)
        return _SPELLED[self.spelling](skip, branch, self.scale.type_as(skip))


class Branch(nn.Module):
    """Something that depends on its input, with sums inside that are no residual additions."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.f, self.g, self.h = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.a = nn.Linear(WIDTH, 2, bias=False)
        self.b = nn.Linear(2, WIDTH, bias=False)
        self.scale = nn.Parameter(torch.rand(WIDTH))
        self.mask = nn.Parameter(torch.randn(LENGTH, LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = getattr(self, self.kind)(x)
        return branch

    def linear(self, x: Tensor) -> Tensor:
        return self.f(x)

    def polynomial(self, x: Tensor) -> Tensor:
        y = self.f(x) + self.scale
        return self.g(0.5 * y * (1 + torch.tanh(0.8 * (y + 0.044715 * y**3))))

    def attention(self, x: Tensor) -> Tensor:
        scores = self.rotated(self.f(x)) @ self.rotated(self.g(x)).transpose(1, 2)
        return (scores + self.mask).softmax(-1) @ self.h(x)

    def rotated(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return x * self.scale + torch.cat((-right, left), -1) * self.scale

    def low_rank(self, x: Tensor) -> Tensor:
        return self.f(x) + 0.5 * self.b(self.a(x))

    def experts(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.h(x)) * self.f(x) + self.g(x)

    def pooling(self, x: Tensor) -> Tensor:
        return x.cumsum(1) - x

    def scaled(self, x: Tensor) -> Tensor:
        return self.scale * F.relu(self.f(x), inplace=True)

    def scan(self, x: Tensor) -> Tensor:
        state = self.f(x[:, 0])
        states = [state]
        for step in range(1, LENGTH):
            state = state * self.scale + self.g(x[:, step])
            states.append(state)
        return torch.stack(states, 1)


class Reader(nn.Module):
    """Reads a state, in the dtype of the layers, through a norm or as it is."""

    def __init__(self, dtype: torch.dtype, normed: bool) -> None:
        super().__init__()
        self.dtype = dtype
        self.norm = nn.LayerNorm(WIDTH) if normed else nn.Identity()
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, other: Tensor | None) -> Tensor:
        read: Tensor = self.norm(x.to(self.dtype))
        if other is None:
            return read
        return read * torch.sigmoid(self.gate(other.to(self.dtype)))


class ResidualStep(nn.Module):
    def __init__(self, step: Residual, labels: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.step = step
        self.reader = Reader(dtype, step.normed)
        self.branches = nn.ModuleList(Branch(kind) for kind in step.branches)
        carriers = [step.carrier] + ["plain"] * (len(labels) - 1)
        self.sums = nn.ModuleList(
            Sum(label, step.spelling, c) for label, c in zip(labels, carriers, strict=True)
        )

    def forward(self, x: Tensor, others: list[Tensor], outputs: list[Tensor]) -> Tensor:
        read = self.reader(x, others[-1] if self.step.crossed else None)
        made = [branch(read) for branch in self.branches]
        for number, (add, branch) in enumerate(zip(self.sums, made, strict=True)):
            if number == 1 and self.step.read_between:
                outputs.append(torch.tanh(x))
            x = add(x, branch)
        return x


class AbsorbStep(nn.Module):
    def __init__(self, step: Absorb, dtype: torch.dtype) -> None:
        super().__init__()
        self.step = step
        self.dtype = dtype
        shape = (LENGTH, WIDTH) if step.what == "positions" else (WIDTH,)
        self.value = nn.Parameter(torch.randn(shape))
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, others: list[Tensor], outputs: list[Tensor]) -> Tensor:
        value = self.layer(others[-1].to(self.dtype)) if self.step.what == "other" else self.value
        return value + x if self.step.right else x + value


class ReadStep(nn.Module):
    def forward(self, x: Tensor, others: list[Tensor], outputs: list[Tensor]) -> Tensor:
        outputs.append(x.mean(1))
        return x


class InterruptStep(nn.Module):
    def __init__(self, how: str, label: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.how = how
        self.reader = Reader(dtype, normed=True)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.sum = Sum(label, "left", "plain")

    def forward(self, x: Tensor, others: list[Tensor], outputs: list[Tensor]) -> Tensor:
        read = self.reader(x, None)
        if self.how == "norm":
            return read
        if self.how == "activation":
            return torch.relu(x)
        return self.sum(0.9 * x, self.layer(read))


class GroupStep(nn.Module):
    def __init__(self, inner: nn.ModuleList, bare: bool, label: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = inner
        self.reader = None if bare else Reader(dtype, normed=False)
        self.branch = Branch("linear")
        self.sum = Sum(label, "left", "plain")

    def forward(self, x: Tensor, others: list[Tensor], outputs: list[Tensor]) -> Tensor:
        y = x
        for step in self.inner:
            y = step(y, others, outputs)
        return self.sum(x, y if self.reader is None else self.branch(self.reader(y, None)))


class ForkStep(nn.Module):
    def __init__(self, arm: nn.ModuleList, onward: nn.Module) -> None:
        super().__init__()
        self.arm = arm
        self.onward = onward

    def forward(self, x: Tensor, others: list[Tensor], outputs: list[Tensor]) -> Tensor:
        y = x
        for step in self.arm:
            y = step(y, others, outputs)
        if len(self.arm):
            outputs.append(y)
        return self.onward(x, others, outputs)


class Network(nn.Module):
    """Streams over one input; the result is what was read of them."""

    def __init__(self, num_streams: int, steps: list[tuple[int, nn.Module]]) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(num_streams))
        self.positions = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.turns = [turn for turn, _ in steps]
        self.steps = nn.ModuleList(step for _, step in steps)

    def forward(self, inputs: Tensor) -> list[Tensor]:
        states = [embed(inputs) + self.positions for embed in self.embeddings]
        outputs: list[Tensor] = []
        for turn, step in zip(self.turns, self.steps, strict=True):
            states[turn] = step(states[turn], states[:turn], outputs)
        return [*outputs, *states]

    def labels(self) -> dict[str, int]:
        """The label of the addition in each module, by path."""
        return {path: m.label for path, m in self.named_modules() if isinstance(m, Sum)}
