"""Arguments of a mix for the kernel tests, and what it and its gradients should be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnres_compile.kernels import reference
from attnres_compile.kernels.reference import Aggregate
from tolerances import assert_matches

Mix = Callable[..., Tensor]


@dataclass(frozen=True)
class MixCase:
    """The arguments of a mix, and the gradient that arrives at its result."""

    sources: tuple[Tensor, ...]
    query: Tensor
    gain: Tensor | None
    grad: Tensor
    aggregate: Aggregate = "sum"
    dim: int = -1
    eps: float = 1e-6

    def tensors(self) -> dict[str, Tensor]:
        """Everything that gets a gradient, by name."""
        named = {f"sources[{i}]": source for i, source in enumerate(self.sources)}
        named["query"] = self.query
        return named if self.gain is None else {**named, "gain": self.gain}

    def to(self, dtype: torch.dtype) -> MixCase:
        """The same values in another dtype."""
        return replace(
            self,
            sources=tuple(_leaf(source.to(dtype)) for source in self.sources),
            query=_leaf(self.query.to(dtype)),
            gain=None if self.gain is None else _leaf(self.gain.to(dtype)),
            grad=self.grad.to(dtype),
        )

    def run(self, mix: Mix) -> dict[str, Tensor]:
        """The result of ``mix`` under "mixed", and the gradient of every tensor under its name."""
        options = {"eps": self.eps, "aggregate": self.aggregate, "dim": self.dim}
        mixed = mix(list(self.sources), self.query, self.gain, **options)
        named = self.tensors()
        grads = torch.autograd.grad(mixed, list(named.values()), self.grad)
        return {"mixed": mixed, **dict(zip(named, grads, strict=True))}

    def expected(self) -> dict[str, Tensor]:
        """The same by the specification in float64, each result rounded once to its dtype."""
        dtypes = {name: tensor.dtype for name, tensor in self.tensors().items()}
        dtypes["mixed"] = self.grad.dtype
        results = self.to(torch.float64).run(reference.mix)
        return {name: result.to(dtypes[name]) for name, result in results.items()}


def make_case(
    num_sources: int,
    shape: Sequence[int],
    *,
    dim: int = -1,
    dtype: torch.dtype = torch.float32,
    aggregate: Aggregate = "sum",
    with_gain: bool = True,
) -> MixCase:
    """Sources of different magnitudes, and logits of order one."""
    generator = torch.Generator().manual_seed(num_sources * 1000 + shape[dim])

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    width = shape[dim]
    return MixCase(
        sources=tuple((0.5 + i) * normal(*shape) for i in range(num_sources)),
        query=normal(width) / width**0.5,
        gain=1 + 0.3 * normal(width) if with_gain else None,
        grad=normal(*shape),
        aggregate=aggregate,
        dim=dim,
    ).to(dtype)


def assert_case_matches(case: MixCase, mix: Mix) -> None:
    """``mix`` gives the result and every gradient that the specification asks for."""
    expected = case.expected()
    # A single channel over its own RMS is its sign, so that its gradients are what is left when
    # terms a thousand times larger cancel.
    factor = 10 if case.query.numel() == 1 else 1
    for name, result in case.run(mix).items():
        assert_matches(result, expected[name], name=name, factor=factor)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()
