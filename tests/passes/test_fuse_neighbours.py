"""What is fused into a site, what is left beside it, and that no value changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from attnres_compile.functional import attnres
from attnres_compile.passes.fuse_neighbours import fuse_neighbours
from attnres_compile.passes.schedule_two_phase import schedule_two_phase
from schedule_helpers import (
    WIDTH,
    Tensors,
    assert_unchanged_values,
    captured,
    count,
    network,
    sites,
    tensors,
)

Reader = Callable[[Tensor, Tensors, int], Tensor]
BLOCKS = (1, 1, 2)  # the last in two phases, and the first two in one pass a site
SITES = sum(BLOCKS)
SHAPE = (WIDTH,)


def schedule_and_fuse(graph: fx.Graph) -> None:
    schedule_two_phase(graph)
    fuse_neighbours(graph)


def fused(reader: Reader, blocks: tuple[int, ...] = BLOCKS) -> list[fx.Node]:
    graph = assert_unchanged_values(
        lambda t: network(t, blocks, reader), tensors(sum(blocks)), schedule_and_fuse
    )
    return sites(graph)


def by_steps(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return normed if weight is None else weight * normed


def cast_and_back(x: Tensor, t: Tensors, i: int) -> Tensor:
    wide = x.to(torch.float64)
    wide = wide * torch.rsqrt((wide * wide).mean(dim=-1, keepdim=True) + 1e-6)
    return (wide * (1.0 + t[f"weight{i}"])).type_as(x)


FUSED: dict[str, tuple[str, Reader]] = {
    "layer_norm": (
        "layer",
        lambda x, t, i: F.layer_norm(x, SHAPE, t[f"weight{i}"], t[f"bias{i}"], 1e-5),
    ),
    "layer_norm without weights": ("layer", lambda x, t, i: F.layer_norm(x, SHAPE)),
    "rms_norm": ("rms", lambda x, t, i: F.rms_norm(x, SHAPE, t[f"weight{i}"], 1e-6)),
    "rms_norm with its own eps": ("rms", lambda x, t, i: F.rms_norm(x, SHAPE)),
    "in steps": ("rms", lambda x, t, i: by_steps(x, t[f"weight{i}"])),
    "in steps without a weight": ("rms", lambda x, t, i: by_steps(x)),
    "in steps between casts, with an offset": ("rms", cast_and_back),
    "by square": (
        "rms",
        lambda x, t, i: x * torch.rsqrt(1e-6 + torch.square(x).mean([-1], True)) * t[f"weight{i}"],
    ),
}


@pytest.mark.parametrize(("kind", "reader"), FUSED.values(), ids=FUSED)
def test_norms_are_fused(kind: str, reader: Reader) -> None:
    found = fused(reader)
    assert [site.kwargs["norm"] for site in found] == [kind] * SITES
    assert not any(site.kwargs["wants_mix"] for site in found)


def test_other_readers_get_the_mix_beside_the_norm() -> None:
    found = fused(lambda x, t, i: x + F.layer_norm(x, SHAPE))
    assert all(site.kwargs["norm"] == "layer" and site.kwargs["wants_mix"] for site in found)


LEFT: dict[str, Reader] = {
    "no norm": lambda x, t, i: torch.sin(x),
    "over two dimensions": lambda x, t, i: F.layer_norm(x, (3, WIDTH)),
    "over the tokens": lambda x, t, i: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6),
    "cube": lambda x, t, i: x * torch.rsqrt(x.pow(3).abs().mean(-1, keepdim=True) + 1e-6),
    "eps in a tensor": lambda x, t, i: (
        x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + t[f"bias{i}"][0].abs())
    ),
    "of something else": lambda x, t, i: (
        x * torch.rsqrt(torch.sin(x).pow(2).mean(-1, keepdim=True) + 1e-6)
    ),
    "scale of something else": lambda x, t, i: (
        t["root"] * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    ),
    "statistic read elsewhere": lambda x, t, i: (
        (m := x.pow(2).mean(-1, keepdim=True)) + x * torch.rsqrt(m + 1e-6)
    ),
}


@pytest.mark.parametrize("reader", LEFT.values(), ids=LEFT)
def test_what_is_no_norm_of_the_mix_is_left(reader: Reader) -> None:
    assert [site.kwargs["norm"] for site in fused(reader)] == ["none"] * SITES


def test_a_norm_behind_a_rounding_is_left() -> None:
    def rounded(x: Tensor, t: Tensors, i: int) -> Tensor:
        return by_steps(x.to(torch.float32)).double()

    graph, _ = captured(lambda t: network(t, BLOCKS, rounded), tensors(SITES), schedule_and_fuse)
    assert [site.kwargs["norm"] for site in sites(graph)] == ["none"] * SITES


def test_a_weight_from_the_data_is_multiplied_outside() -> None:
    found = fused(lambda x, t, i: by_steps(x) * torch.tanh(x).mean((0, 1)))
    assert all(site.kwargs["norm"] in ("none", "rms") for site in found)
    assert all(site.kwargs["norm_weight"] is None for site in found)


def test_partial_sums_are_formed_in_their_sites() -> None:
    found = fused(lambda x, t, i: x, (2, 2, 3))
    # The first branch of a block is its partial sum; its stand-in is the third addend of the next.
    assert [len(site.kwargs["addends"]) for site in found] == [1, 1, 1, 0, 1, 3, 2]  # type: ignore[arg-type]


def addition(body: Callable[[Tensors, Tensor], Tensor]) -> int:
    """How many addends the last of three sites has."""

    def whole(t: Tensors) -> Tensor:
        sources = [t["root"], t["branch0"], t["branch1"]]
        read = attnres(sources, t["query0"])
        partial = torch.tanh(read)
        read = attnres([*sources, partial], t["query1"])
        return body(t, partial) * read

    graph = assert_unchanged_values(whole, tensors(4), schedule_and_fuse)
    return len(sites(graph)[-1].kwargs["addends"])  # type: ignore[arg-type]


def plain(t: Tensors, partial: Tensor) -> Tensor:
    total = partial + t["branch2"]
    return attnres([t["root"], t["branch0"], t["branch1"], total], t["query2"]) * total


def read_before(t: Tensors, partial: Tensor) -> Tensor:
    total = partial + t["branch2"]
    other = torch.sin(total)
    return attnres([t["root"], t["branch0"], t["branch1"], total], t["query2"]) * other


def with_alpha(t: Tensors, partial: Tensor) -> Tensor:
    total = torch.add(partial, t["branch2"], alpha=2)
    return attnres([t["root"], t["branch0"], t["branch1"], total], t["query2"])


def broadcast(t: Tensors, partial: Tensor) -> Tensor:
    total = partial + t["bias0"]
    return attnres([t["root"], t["branch0"], t["branch1"], total], t["query2"])


@pytest.mark.parametrize(
    ("body", "addends"), [(plain, 3), (read_before, 1), (with_alpha, 1), (broadcast, 1)]
)
def test_additions(body: Callable[[Tensors, Tensor], Tensor], addends: int) -> None:
    assert addition(body) == addends


@pytest.mark.parametrize(("writes", "addends"), [(False, 2), (True, 1)])
def test_an_addition_of_what_is_overwritten_stays_where_it_is(writes: bool, addends: int) -> None:
    def body(t: Tensors) -> Tensor:
        with torch.no_grad():
            branch = torch.tanh(t["branch2"])
            total = t["branch3"] + branch
            if writes:
                branch.mul_(3)
            read = attnres([t["root"], t["branch0"], total], t["query2"]) + branch
        return read + t["bias0"]

    graph = assert_unchanged_values(body, tensors(4), schedule_and_fuse)
    assert [len(site.kwargs["addends"]) for site in sites(graph)] == [addends]  # type: ignore[arg-type]


@pytest.mark.parametrize(("writes", "norm"), [(False, "layer"), (True, "none")])
def test_the_norm_of_a_mix_that_is_overwritten_is_left(writes: bool, norm: str) -> None:
    def body(t: Tensors) -> Tensor:
        with torch.no_grad():
            mixed = attnres([t["root"], t["branch0"]], t["query2"])
            if writes:
                mixed[:, 0] = 1.0
            read = F.layer_norm(mixed, SHAPE, t["weight0"], t["bias0"])
        return read + t["bias0"]

    graph = assert_unchanged_values(body, tensors(2), schedule_and_fuse)
    assert [site.kwargs["norm"] for site in sites(graph)] == [norm]


@pytest.mark.parametrize(("twice", "addends"), [(False, 2), (True, 1)])
def test_an_addition_that_is_two_sources_stays_where_it_is(twice: bool, addends: int) -> None:
    def body(t: Tensors) -> Tensor:
        total = t["branch0"] + t["branch1"]
        return attnres([t["root"], *([total] if twice else []), total], t["query2"])

    graph = assert_unchanged_values(body, tensors(2), schedule_and_fuse)
    assert [len(site.kwargs["addends"]) for site in sites(graph)] == [addends]  # type: ignore[arg-type]


def detached(t: Tensors) -> Tensor:
    """A block whose partial sums are trained on, and none of whose mixes is."""
    sources = [torch.tanh(t[f"branch{i}"]) for i in range(3)]
    partial = t["root"] * t["branch3"]
    first = attnres([*sources, partial], t["query0"]).detach()
    partial = partial + torch.tanh(first)
    second = attnres([*sources, partial], t["query1"]).detach()
    return partial * first + torch.tanh(partial) * second * t["branch0"]


def test_a_block_whose_mixes_get_no_gradients() -> None:
    graph = assert_unchanged_values(detached, tensors(4), schedule_and_fuse)
    assert count(graph, "phase1") == 1
