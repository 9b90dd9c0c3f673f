"""Which mixes are scheduled in two phases, and that the schedule changes no value."""

from __future__ import annotations

import pytest
import torch
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
    network_of_deltas,
    sites,
    tensors,
)


@pytest.mark.parametrize(
    ("blocks", "phase1", "complete"),
    [
        ((2, 2), 0, 0),  # at most two completed sources
        ((2, 2, 2), 1, 3),  # the third block has root and two
        ((2, 2, 2, 3), 2, 4),
        ((1,) * 6, 1, 6),  # full: single sites, but for the last read, which shares the sources
        ((1, 1, 4, 1), 2, 4),
        ((2, 2, 1, 1, 3), 1, 5),  # blocks of one site between are read in one pass
    ],
)
def test_blocks_and_values(blocks: tuple[int, ...], phase1: int, complete: int) -> None:
    given = tensors(sum(blocks))
    graph = assert_unchanged_values(lambda t: network(t, blocks), given, schedule_two_phase)
    assert count(graph, "mix") == 0
    assert count(graph, "phase2") == sum(blocks)
    assert (count(graph, "phase1"), count(graph, "complete")) == (phase1, complete)


@pytest.mark.parametrize("blocks", [(2, 2), (2, 2, 2, 3), (1,) * 6])
@pytest.mark.parametrize("fuse", [False, True])
def test_differences_of_states_as_sources(blocks: tuple[int, ...], fuse: bool) -> None:
    def change(graph: fx.Graph) -> None:
        schedule_two_phase(graph)
        if fuse:
            fuse_neighbours(graph)

    given = tensors(sum(blocks))
    graph = assert_unchanged_values(lambda t: network_of_deltas(t, blocks), given, change)
    assert count(graph, "mix") == 0
    assert count(graph, "phase2") == sum(blocks)
    assert count(graph, "phase1") == {2: 0, 4: 2, 6: 1}[len(blocks)]


def test_a_site_has_a_result_of_phase_1_or_direct_sources() -> None:
    graph, _ = captured(lambda t: network(t, (2, 2, 3)), tensors(7), schedule_two_phase)
    kinds = [(s.kwargs["before"] is not None, len(s.kwargs["sources"])) for s in sites(graph)]  # type: ignore[arg-type]
    # In one pass the newest source, completed or not, is an addend.
    assert kinds == [(False, 1), (False, 1), (False, 2), *[(True, 0)] * 4]


def test_source_and_count_of_a_mix_stay() -> None:
    graph, _ = captured(lambda t: network(t, (2, 2, 3)), tensors(7), schedule_two_phase)
    assert [s.kwargs["count"] for s in sites(graph)] == [2, 2, 3, 3, 4, 4, 4]


def test_two_queries_of_one_depth_share_the_block() -> None:
    def body(t: Tensors) -> Tensor:
        sources = [t["root"], t["branch0"], t["branch1"]]
        first = attnres(sources, t["query0"], t["gain0"])
        second = attnres(sources, t["query1"])
        partial = torch.tanh(first + second)
        third = attnres([*sources, partial], t["query2"], aggregate="sum")
        fourth = attnres([*sources, partial], t["query3"], aggregate="mean")
        return third * fourth

    graph = assert_unchanged_values(body, tensors(4), schedule_two_phase)
    assert (count(graph, "phase1"), count(graph, "phase2")) == (1, 4)


def test_queries_that_are_computed_late_are_brought_forward() -> None:
    def body(t: Tensors) -> Tensor:
        sources = [t["root"], t["branch0"], t["branch1"]]
        partial = torch.tanh(attnres(sources, t["query0"]))
        partial = partial + torch.tanh(attnres([*sources, partial], 2 * t["query1"]))
        return attnres([*sources, partial], t["queries"].unbind()[1] - t["query1"])

    given = tensors(3)
    given["queries"] = torch.randn(2, WIDTH).double()
    graph = assert_unchanged_values(body, given, schedule_two_phase)
    assert count(graph, "phase1") == 1


def test_queries_that_are_computed_before_anything_else() -> None:
    def body(t: Tensors) -> Tensor:
        queries = torch.stack([t[f"query{i}"] for i in range(7)]).unbind()
        return network(t | {f"query{i}": query for i, query in enumerate(queries)}, (2, 2, 2))

    graph = assert_unchanged_values(body, tensors(6), schedule_two_phase)
    assert count(graph, "phase1") == 1


def test_a_query_that_depends_on_the_data_keeps_its_block_in_one_pass() -> None:
    def body(t: Tensors) -> Tensor:
        sources = [t["root"], t["branch0"], t["branch1"]]
        partial = torch.tanh(attnres(sources, t["query0"]))
        return attnres([*sources, partial], partial.mean((0, 1)))

    graph = assert_unchanged_values(body, tensors(3), schedule_two_phase)
    assert (count(graph, "phase1"), count(graph, "phase2")) == (0, 2)


def test_a_mix_whose_statistics_are_used_stays() -> None:
    def body(t: Tensors) -> Tensor:
        mixed, logits, _ = torch.ops.attnres.mix(
            [t["root"], t["branch0"]], t["query0"], None, 1e-6, True, -1
        )
        return mixed * logits[0].detach().unsqueeze(-1)

    graph = assert_unchanged_values(body, tensors(1), schedule_two_phase)
    assert (count(graph, "mix"), count(graph, "phase2")) == (1, 0)


def test_only_what_is_admitted_is_scheduled() -> None:
    graph, _ = captured(
        lambda t: network(t, (2, 2, 2)),
        tensors(6),
        lambda g: schedule_two_phase(g, lambda _: False),
    )
    assert (count(graph, "mix"), count(graph, "phase2")) == (6, 0)


def test_channels_of_images() -> None:
    torch.manual_seed(0)
    images = {f"x{i}": torch.randn(2, WIDTH, 3, 2).double() for i in range(4)}
    queries = {f"query{i}": torch.randn(WIDTH).double() for i in range(3)}

    def body(t: Tensors) -> Tensor:
        sources = [t["x0"], t["x1"], t["x2"]]
        partial = torch.tanh(attnres(sources, t["query0"], dim=1))
        partial = partial + torch.tanh(attnres([*sources, partial], t["query1"], dim=1))
        return attnres([*sources, partial], t["query2"], dim=-3)

    graph = assert_unchanged_values(body, {**images, **queries}, schedule_two_phase)
    assert count(graph, "phase1") == 1
    assert {site.kwargs["dim"] for site in sites(graph)} == {-3}


def test_two_streams_do_not_share_blocks() -> None:
    def body(t: Tensors) -> Tensor:
        left = network(t, (2, 2, 2))
        right = network({**t, "root": t["weight0"] * t["root"]}, (2, 2, 2))
        return left * right

    graph = assert_unchanged_values(body, tensors(6), schedule_two_phase)
    assert (count(graph, "phase1"), count(graph, "complete")) == (2, 6)


@pytest.mark.parametrize("root", ["its own", "the other's"])
@pytest.mark.parametrize("fuse", [False, True])
def test_a_mix_is_a_source_of_another_stream(root: str, fuse: bool) -> None:
    """As in ``x + g(x)`` where g is a stream that starts at x, or at another value."""

    def nested(t: Tensors) -> Tensor:
        outer = t["root"]
        start = outer if root == "the other's" else torch.tanh(outer)
        sources = [outer]
        for group in range(3):
            inner = [start]
            for k in range(2):
                mixed = attnres(inner, t[f"query{2 * group + k}"])
                inner.append(torch.tanh(mixed) * t[f"branch{2 * group + k}"])
            sources.append(attnres(inner, t[f"query{group}"]))
        return attnres(sources, t["query6"]) * attnres(sources, t["query7"])

    def change(graph: fx.Graph) -> None:
        schedule_two_phase(graph)
        if fuse:
            fuse_neighbours(graph)

    graph = assert_unchanged_values(nested, tensors(7), change)
    assert (count(graph, "mix"), count(graph, "phase2")) == (0, 11)


def test_a_graph_without_mixes_stays() -> None:
    def change(graph: fx.Graph) -> None:
        before = len(graph.nodes)
        schedule_two_phase(graph)
        assert len(graph.nodes) == before

    captured(lambda t: t["root"] + t["branch0"], tensors(1), change)


def test_a_mix_of_one_source_may_come_first() -> None:
    def body(t: Tensors) -> Tensor:
        sources = [t["root"]]
        for i in range(5):
            read = attnres(sources, t[f"query{i}"])
            sources = [*sources, torch.tanh(read)]
        partial = torch.tanh(attnres(sources, t["query5"]))
        return attnres([*sources, partial], t["query6"])

    graph = assert_unchanged_values(body, tensors(6), schedule_two_phase)
    assert count(graph, "phase1") >= 1


def written_root(t: Tensors, when: str) -> Tensor:
    """Block AttnRes over a root that is overwritten before its sites, or between them."""
    root = torch.tanh(t["root"])
    if when == "before":
        root.mul_(3)
    sources = [root, t["branch0"], t["branch1"]]
    partial = torch.tanh(attnres(sources, t["query0"]).detach())
    if when == "between":
        root.mul_(3)
    return attnres([*sources, partial], t["query1"])


@pytest.mark.parametrize(("when", "phase1"), [("never", 1), ("before", 1), ("between", 0)])
def test_a_source_is_scored_when_it_is_as_its_sites_read_it(when: str, phase1: int) -> None:
    def inference(t: Tensors) -> Tensor:
        with torch.no_grad():
            read = written_root(t, when)
        return read + t["bias0"]  # something to differentiate

    graph = assert_unchanged_values(inference, tensors(2), schedule_two_phase)
    assert count(graph, "phase1") == phase1
