"""Readers of a stream get the strides they were traced with, and a usual stream is not copied."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from attnres_compile.functional import attnres
from attnres_compile.passes.fuse_neighbours import fuse_neighbours
from attnres_compile.passes.keep_layouts import keep_layouts
from attnres_compile.passes.lower import lower
from attnres_compile.passes.schedule_two_phase import schedule_two_phase
from schedule_helpers import (
    WIDTH,
    Change,
    Tensors,
    assert_unchanged_values,
    captured,
    network,
    sites,
    tensors,
)

Reader = Callable[[Tensor, Tensors, int], Tensor]
BLOCKS = (1, 1, 2)


def as_phases(graph: fx.Graph) -> None:
    schedule_two_phase(graph)
    fuse_neighbours(graph)


def in_two_phases(graph: fx.Graph) -> None:
    as_phases(graph)
    keep_layouts(graph)


def in_cpp(graph: fx.Graph) -> None:
    lower(graph, "auto")


def transposed(x: Tensor) -> Tensor:
    """The same tokens, as if they had been an image."""
    return x.mT.contiguous().mT


def body(reader: Reader, *, lie: Callable[[Tensor], Tensor] = transposed) -> Callable[..., Tensor]:
    """A network all of whose sources lie in some way, and with them what its readers get."""

    def run(t: Tensors) -> Tensor:
        laid_out = {n: lie(x) if x.ndim > 1 else x for n, x in t.items()}
        return network(laid_out, BLOCKS, reader)

    return run


def by_view(x: Tensor) -> Tensor:
    """Needs transposed tokens: a view merges what comes before them with the channels."""
    length = x.shape[-2]
    return torch.sin(x.transpose(-1, -2).view(-1, length)).view(*x.shape[:-2], -1, length).mT


def in_steps(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


READERS: dict[str, Reader] = {
    "the mix": lambda x, t, i: by_view(x),
    "a norm in steps": lambda x, t, i: by_view(in_steps(x, t[f"weight{i}"])),
    "the mix beside its norm": lambda x, t, i: by_view(x) + F.layer_norm(x, (WIDTH,)),
    "who writes into the mix": lambda x, t, i: by_view(x.mul_(2.0)),
}


@pytest.mark.parametrize(
    ("name", "change"),
    [*((name, in_two_phases) for name in READERS), ("the mix beside its norm", in_cpp)],
)
def test_readers_get_the_layout_of_the_sources(name: str, change: Change) -> None:
    graph = assert_unchanged_values(body(READERS[name]), tensors(4), change)
    assert len(sites(graph)) == copies(graph) == 4


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_phases_alone_would_not_give_it(reader: Reader) -> None:
    with pytest.raises(Exception, match="Cannot view a tensor"):
        captured(body(reader), tensors(4), as_phases)


def test_norms_are_fused_all_the_same() -> None:
    readers = [READERS["a norm in steps"], READERS["the mix beside its norm"]]
    found = [sites(captured(body(r), tensors(4), in_two_phases)[0]) for r in readers]
    assert [{site.kwargs["norm"] for site in each} for each in found] == [{"rms"}, {"layer"}]
    assert [{site.kwargs["wants_mix"] for site in each} for each in found] == [{False}, {True}]


def test_a_norm_whose_result_lies_row_by_row_is_not_copied() -> None:
    graph = assert_unchanged_values(
        body(lambda x, t, i: F.layer_norm(x, (WIDTH,)).view(-1, WIDTH).view(x.shape)),
        tensors(4),
        in_two_phases,
    )
    assert copies(graph) == 0
    assert {site.kwargs["norm"] for site in sites(graph)} == {"layer"}


@pytest.mark.parametrize("change", [in_two_phases, in_cpp])
def test_sums_that_others_read(change: Change) -> None:
    """A site without a mix reads a partial sum, and what follows the stream a completed one."""

    def run(t: Tensors) -> Tensor:
        root, *branches = (transposed(t[n]) for n in ("root", "branch0", "branch1", "branch2"))
        completed, more = [root], 0.0
        for i, branch in enumerate(branches):
            first = torch.tanh(branch + attnres(completed, t[f"query{i}"]))
            total = first + torch.cos(attnres([*completed, first], t[f"query{i}"]))
            mixed = attnres([*completed, total], t[f"gain{i}"])
            more = more + by_view(total) + mixed
            completed.append(total)
        return more + attnres(completed, t["query3"])

    graph = assert_unchanged_values(run, tensors(3), change)
    assert copies(graph) == 3 + 10  # of the sums and of the mixes
    with pytest.raises(Exception, match="Cannot view a tensor"):
        captured(run, tensors(3), as_phases)


def test_images_with_the_channels_last_in_memory() -> None:
    def run(t: Tensors) -> Tensor:
        sources = [torch.sin(t["x"]), torch.cos(t["x"])]
        mixed = attnres(sources, t["query"], dim=1)
        return mixed.permute(0, 2, 3, 1).view(-1, 8)

    x = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    given = {"x": x.to(memory_format=torch.channels_last), "query": torch.randn(8).double()}
    assert copies(assert_unchanged_values(run, given, in_two_phases)) == 1
    with pytest.raises(Exception, match="Cannot view a tensor"):
        captured(run, given, as_phases)


@pytest.mark.parametrize("change", [in_two_phases, in_cpp])
@pytest.mark.parametrize(
    "lie", [lambda x: x, lambda x: transposed(x[:1, :1])], ids=["rows", "one token"]
)
def test_rows_are_not_copied(lie: Callable[[Tensor], Tensor], change: Change) -> None:
    reader: Reader = lambda x, t, i: torch.sin(x.view(-1, WIDTH)).view(x.shape)  # noqa: E731
    graph = assert_unchanged_values(body(reader, lie=lie), tensors(4), change)
    assert (len(sites(graph)), copies(graph)) == (4, 0)
    assert not any("permute" in str(node.target) for node in graph.nodes)


def copies(graph: fx.Graph) -> int:
    return sum(node.target is torch.ops.aten.clone.default for node in graph.nodes)


def test_a_stream_of_as_many_tokens_as_the_data_say() -> None:
    """Nothing is known of how it lies but that it lies row by row; it was taken for transposed."""
    weight, queries = torch.randn(8, 8), torch.randn(2, 8)

    def model(x: Tensor, chosen: Tensor) -> Tensor:
        root = x[:, chosen.nonzero().squeeze(1)]
        read = attnres([root, root.sin()], queries[0])
        branch = torch.tanh(read.view(-1, 8) @ weight).view(read.shape)
        return attnres([root, root.sin() + branch], queries[1])

    x, chosen = torch.randn(2, 6, 8), torch.tensor([1, 0, 1, 1, 1, 0])
    torch._dynamo.reset()
    with (
        torch._inductor.config.patch(force_disable_caches=True),
        torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True),
        torch.no_grad(),
    ):
        compiled = torch.compile(model, backend="attnres", fullgraph=True)
        torch.testing.assert_close(compiled(x, chosen), model(x, chosen))
