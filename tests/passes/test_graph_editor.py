"""What is read earlier than before is read as it was: parameters that the graph writes into."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from attnres_compile.functional import attnres
from attnres_compile.passes.fuse_neighbours import fuse_neighbours
from attnres_compile.passes.schedule_two_phase import schedule_two_phase
from schedule_helpers import WIDTH, Tensors, assert_unchanged_values, count, sites, tensors

Write = Callable[[Tensor], object]
WRITES: dict[str, Write] = {
    "itself": lambda vector: vector.mul_(-2),
    "a view": lambda vector: vector.view(2, -1)[1].zero_(),
    "a strided view": lambda vector: torch.as_strided(vector, (WIDTH // 2,), (2,)).zero_(),
    "its data": lambda vector: vector.data.clamp_(-0.1, 0.1),
    "a list": lambda vector: torch._foreach_mul_([torch.zeros(1), vector], 2.0),
}


def schedule_and_fuse(graph: fx.Graph) -> None:
    schedule_two_phase(graph)
    fuse_neighbours(graph)


def two_sites(t: Tensors, written: str, when: str, write: Write) -> Tensor:
    """A block over three completed sources, and a parameter that is written somewhere."""

    def pause(here: str) -> None:
        if here == when:
            with torch.no_grad():
                write(t[written])

    sources = [torch.tanh(t["root"]), t["branch0"], t["branch1"]]
    pause("before")
    partial = torch.tanh(attnres(sources, t["query0"], t["gain0"]))
    pause("between")
    read = attnres([*sources, partial], t["query1"] * 2, t["gain1"])
    pause("after")
    return torch.tanh(read)


@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("written", ["query1", "gain1"])
def test_a_parameter_written_after_the_sources_are_scored_keeps_its_block_in_one_pass(
    written: str, how: str
) -> None:
    graph = assert_unchanged_values(
        lambda t: two_sites(t, written, "between", WRITES[how]), tensors(2), schedule_and_fuse
    )
    assert count(graph, "phase1") == 0


@pytest.mark.parametrize(
    ("written", "when"),
    [
        ("query0", "before"),
        ("query1", "before"),
        ("gain1", "before"),
        ("query0", "between"),  # nobody reads it any more
        ("query1", "after"),
        ("bias0", "between"),  # nobody reads it at all
    ],
)
def test_other_writes_do_not(written: str, when: str) -> None:
    def inference(t: Tensors) -> Tensor:  # autograd would miss what is written after it was read
        with torch.no_grad():
            read = two_sites(t, written, when, WRITES["itself"])
        return read + t["weight0"]  # something to differentiate

    graph = assert_unchanged_values(inference, tensors(2), schedule_and_fuse)
    assert count(graph, "phase1") == 1


@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize(
    ("written", "norm"), [("weight0", "none"), ("bias0", "none"), ("weight1", "layer")]
)
def test_a_norm_whose_parameters_are_written_after_the_mix_is_left(
    written: str, norm: str, how: str
) -> None:
    def body(t: Tensors) -> Tensor:
        mixed = attnres([t["root"], t["branch0"]], t["query0"])
        with torch.no_grad():
            WRITES[how](t[written])
        return F.layer_norm(mixed, (WIDTH,), t["weight0"], t["bias0"])

    graph = assert_unchanged_values(body, tensors(1), schedule_and_fuse)
    assert [site.kwargs["norm"] for site in sites(graph)] == [norm]


@pytest.mark.parametrize("offset", ["weight0", "weight1"])
def test_a_parameter_is_computed_from_what_stands_there_when_it_is(offset: str) -> None:
    """`weight1` is computed from the former value of what is then written."""

    def body(t: Tensors) -> Tensor:
        mixed = attnres([t["root"], t["branch0"]], t["query0"])
        scale = 1 + t["weight0"]
        with torch.no_grad():
            t[offset].mul_(-2)
        return F.rms_norm(mixed, (WIDTH,), scale + t["weight1"])

    graph = assert_unchanged_values(body, tensors(1), schedule_and_fuse)
    assert [site.kwargs["norm"] for site in sites(graph)] == ["none"]
