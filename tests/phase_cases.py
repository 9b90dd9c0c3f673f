"""Blocks of sites through the phase operators, and what they and their gradients should be.

A case starts with ``completed`` sources (the root, and sums of two branches), runs a block of
sites for every entry of ``sites``, and completes a source after each. All tensors are leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnres_compile.kernels import phases, reference

EPS = 1e-6
NORM_EPS = 1e-5
ONE_PASS = 2  # as many completed sources or fewer are mixed without a phase 1


@dataclass(frozen=True)
class PhaseCase:
    """The shape of the computation; ``tensors`` makes its inputs."""

    completed: int
    sites: tuple[int, ...]
    shape: tuple[int, ...]
    dim: int = -1
    norm: str = "rms"
    affine: bool = True
    count: bool = True
    wants_mix: bool = False
    sharpness: float = 1.0  # the scale of logits

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Leaves by name; the same values, rounded to ``dtype``, whatever it is."""
        generator = torch.Generator().manual_seed(len(self.sites) + 7 * self.completed)
        width = self.shape[self.dim]

        def normal(name: str, size: Sequence[int], scale: float = 1.0) -> None:
            made[name] = (scale * torch.randn(size, generator=generator)).to(dtype)

        made: dict[str, Tensor] = {}
        normal("root", self.shape, 0.5)
        for i in range(1, self.completed):
            normal(f"first{i}", self.shape)
            normal(f"second{i}", self.shape, 0.3 * i)
        for b, sites in enumerate(self.sites):
            for j in range(sites):
                name = f"{b}.{j}"
                normal(f"branch{name}", self.shape, 0.7)
                query = torch.randn(width, generator=generator) / width**0.5
                made[f"query{name}"] = self.sharpness * query
                made[f"weight{name}"] = 1 + 0.2 * torch.randn(width, generator=generator)
                made[f"bias{name}"] = 0.2 * torch.randn(width, generator=generator)
        return {name: tensor.requires_grad_() for name, tensor in made.items()}

    def grads(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """What arrives at the outputs, the same values in any dtype."""
        generator = torch.Generator().manual_seed(1)
        return [torch.randn(out.shape, generator=generator).to(out.dtype) for out in outputs]

    def run(
        self, compute: Callable[[PhaseCase, dict[str, Tensor]], list[Tensor]], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Outputs and gradients by name."""
        tensors = self.tensors(torch.float32 if dtype == torch.float64 else dtype)
        if dtype == torch.float64:
            tensors = {k: t.detach().double().requires_grad_() for k, t in tensors.items()}
        return self.run_on(compute, tensors)

    def expected(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Float64 results for the values that ``dtype`` holds."""
        rounded = self.tensors(dtype).items()
        tensors = {k: t.detach().double().requires_grad_() for k, t in rounded}
        return self.run_on(by_specification, tensors)

    def run_on(
        self,
        compute: Callable[[PhaseCase, dict[str, Tensor]], list[Tensor]],
        tensors: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        outputs = compute(self, tensors)
        leaves = {k: t for k, t in tensors.items() if t.requires_grad}
        found = torch.autograd.grad(
            outputs, list(leaves.values()), self.grads(outputs), allow_unused=True
        )
        named = {f"output{i}": output.detach() for i, output in enumerate(outputs)}
        named |= {f"d{k}": g for k, g in zip(leaves, found, strict=True) if g is not None}
        return named


# One source of a token has nearly all the weight: of a gradient that is the difference of two
# numbers close to each other, autograd of the formula keeps two to five digits in float32.
SHARP = [
    PhaseCase(1, (4,), (1, 64), norm="none", sharpness=4),
    PhaseCase(3, (4,), (5, 64), norm="none", sharpness=6),
    PhaseCase(8, (4,), (1, 64), norm="none", sharpness=3),
    PhaseCase(8, (4,), (1, 64), sharpness=3),
]


def normalise(case: PhaseCase, mixed: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The norm of a mix in PyTorch's own operators."""
    rows = mixed.movedim(case.dim, -1)
    if case.norm == "layer":
        rows = rows - rows.mean(-1, keepdim=True)
    rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + NORM_EPS)
    if case.affine:
        rows = rows * weight + (bias if case.norm == "layer" else 0)
    return rows.movedim(-1, case.dim)


def by_specification(case: PhaseCase, tensors: dict[str, Tensor]) -> list[Tensor]:
    """Every site by ``reference.mix`` over all of its sources."""
    sources = [tensors["root"]]
    sources += [tensors[f"first{i}"] + tensors[f"second{i}"] for i in range(1, case.completed)]
    outputs = []
    for b, sites in enumerate(case.sites):
        partial: list[Tensor] = []
        for j in range(sites):
            name = f"{b}.{j}"
            mixed = reference.mix(
                [*sources, *partial],
                tensors[f"query{name}"],
                None,
                eps=EPS,
                aggregate="sum" if case.count else "mean",
                dim=case.dim,
            )
            if case.wants_mix or case.norm == "none":
                outputs.append(mixed)
            if case.norm != "none":
                weight, bias = tensors[f"weight{name}"], tensors[f"bias{name}"]
                outputs.append(normalise(case, mixed, weight, bias))
            branch = tensors[f"branch{name}"]
            partial = [branch if not partial else partial[0] + branch]
        sources.append(partial[0])
    return outputs


def by_phases(
    kernels: str, stand_ins: bool = True
) -> Callable[[PhaseCase, dict[str, Tensor]], list[Tensor]]:
    """Every site by the operators, scheduled as the compiler does it."""

    def compute(case: PhaseCase, tensors: dict[str, Tensor]) -> list[Tensor]:
        schedule = Schedule(case, tensors, kernels, stand_ins)
        schedule.complete([tensors["root"]])
        for i in range(1, case.completed):
            schedule.complete([tensors[f"first{i}"], tensors[f"second{i}"]])
        for b in range(len(case.sites)):
            schedule.run_block(b)
        return schedule.outputs

    return compute


class Schedule:
    """The state of a run: sources as data and as carriers, and their logits."""

    def __init__(
        self, case: PhaseCase, tensors: dict[str, Tensor], kernels: str, stand_ins: bool
    ) -> None:
        self.case, self.tensors, self.kernels = case, tensors, kernels
        self.stand_ins = stand_ins
        self.block = 0
        self.direct: list[Tensor] = []  # differentiable, for the one-pass form
        self.data: list[Tensor] = []
        self.carriers: list[Tensor] = []
        self.logits: list[dict[int, Tensor]] = []
        self.outputs: list[Tensor] = []

    def later(self) -> list[int]:
        """The blocks still to come that have a phase 1."""
        blocks = range(self.block, len(self.case.sites))
        return [b for b in blocks if self.case.completed + b > ONE_PASS]

    def complete(self, addends: list[Tensor]) -> None:
        later = self.later()
        if not later:
            total = addends[0] if len(addends) == 1 else addends[0] + addends[1]
            self.direct.append(total)
            self.data.append(total)
            return
        sites = [self.case.sites[b] for b in later]
        queries = torch.stack(
            [
                self.tensors[f"query{b}.{j}"]
                for b, s in zip(later, sites, strict=True)
                for j in range(s)
            ]
        )
        source, logits, _ = phases.complete(addends, queries, EPS, self.case.dim, self.kernels)
        self.data.append(addends[0] if len(addends) == 1 else source)
        self.direct.append(self.data[-1])
        self.carriers = [*self.carriers, source]
        self.logits.append(dict(zip(later, logits.split(sites), strict=True)))

    def run_block(self, b: int) -> None:
        case, sites = self.case, self.case.sites[b]
        mixes: Sequence[Tensor | None] = [None] * sites
        statistics: Sequence[Tensor | None] = [None] * sites
        direct = self.direct
        if len(self.data) > ONE_PASS:
            logits = [of_source[b] for of_source in self.logits]
            mixes, stacked, self.carriers, _ = phases.phase1(
                self.data, self.carriers, logits, case.dim, self.kernels
            )
            statistics, direct = stacked.unbind(), []
        addends: list[Tensor] = []
        for j in range(sites):
            addends = self.run_site(f"{b}.{j}", mixes[j], statistics[j], direct, addends)
        self.block = b + 1
        self.complete(addends)

    def run_site(
        self,
        name: str,
        before: Tensor | None,
        statistics: Tensor | None,
        direct: list[Tensor],
        addends: list[Tensor],
    ) -> list[Tensor]:
        """Append the site's outputs; the addends of the next site."""
        case = self.case
        sources = len(self.data) + bool(addends)
        weight = bias = None
        if case.affine and case.norm != "none":
            weight = self.tensors[f"weight{name}"]
            bias = self.tensors[f"bias{name}"] if case.norm == "layer" else None
        partial, mixed, normed, _ = phases.phase2(
            before,
            statistics,
            direct,
            addends,
            self.tensors[f"query{name}"],
            EPS,
            float(sources) if case.count else 1.0,
            case.norm,
            weight,
            bias,
            NORM_EPS,
            None,
            case.wants_mix,
            case.dim,
            self.kernels,
        )
        if case.wants_mix or case.norm == "none":
            self.outputs.append(mixed)
        if case.norm != "none":
            self.outputs.append(normed)
        branch = self.tensors[f"branch{name}"]
        if not addends:
            return [branch]
        if len(addends) > 1:
            return [partial, branch]
        return [addends[0], branch, partial] if self.stand_ins else [addends[0], branch]
