"""Who computes which mix, by device, dtype, layout and the user's choice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from attnres_compile.errors import BackendError
from attnres_compile.functional import attnres
from attnres_compile.passes.lower import Kernels, lower
from schedule_helpers import Tensors, assert_unchanged_values, captured, count, network, tensors

BLOCKS = (2, 2, 3)


def implementations(graph: fx.Graph) -> set[str]:
    """Of the phases of a graph."""
    phases = [n for n in graph.nodes if "attnres.phase" in str(n.target)]
    phases += [n for n in graph.nodes if "attnres.complete" in str(n.target)]
    return {str(n.kwargs.get("kernels", n.args[-1] if n.args else "")) for n in phases}


def lowered(kernels: Kernels, dtype: torch.dtype = torch.float64) -> fx.Graph:
    given = tensors(7, dtype)
    return captured(lambda t: network(t, BLOCKS), given, lambda g: lower(g, kernels))[0]


def test_a_cpu_runs_one_pass_a_site_over_few_sources() -> None:
    graph = assert_unchanged_values(
        lambda t: network(t, BLOCKS), tensors(7), lambda g: lower(g, "auto")
    )
    assert implementations(graph) == {"cpp"}
    assert (count(graph, "phase1"), count(graph, "phase2")) == (0, 7)


def test_a_cpu_runs_two_phases_from_four_sources_on() -> None:
    """Of these blocks the fourth, of two sites, and the fifth, of three."""
    blocks = (2, 2, 2, 2, 3)
    graph = assert_unchanged_values(
        lambda t: network(t, blocks), tensors(11), lambda g: lower(g, "auto")
    )
    assert implementations(graph) == {"cpp"}
    assert (count(graph, "phase1"), count(graph, "phase2")) == (2, 11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_of_the_cpp_library(dtype: torch.dtype) -> None:
    assert implementations(lowered("auto", dtype)) == {"cpp"}


def test_what_the_cpp_library_is_not_made_for_stays_a_mix() -> None:
    graph = lowered("auto", torch.float16)
    assert (count(graph, "mix"), count(graph, "phase2")) == (7, 0)

    def images(t: Tensors) -> Tensor:
        return attnres([t["x"], torch.sin(t["x"])], t["query"], dim=1)

    given = {"x": torch.randn(2, 8, 3, 3), "query": torch.randn(8)}
    graph, _ = captured(images, given, lambda g: lower(g, "auto"))
    assert (count(graph, "mix"), count(graph, "phase2")) == (1, 0)


def test_reference_leaves_every_mix() -> None:
    graph = lowered("reference")
    assert (count(graph, "mix"), count(graph, "phase2")) == (7, 0)
    mix = torch.ops.attnres.mix
    mixes = [node for node in graph.nodes if node.target in (mix, mix.default)]
    assert [node.kwargs for node in mixes] == [{"kernels": "reference"}] * 7


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnres_compile.kernels.launch.interpreted", lambda: False)
    with pytest.raises(Exception, match="kernels='triton' cannot run on cpu tensors") as caught:
        lowered("triton")
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), BackendError)


def test_triton_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[fx.Graph] = []

    def change(graph: fx.Graph) -> None:
        lower(graph, "triton")
        graphs.append(fx.Graph())
        graphs[0].graph_copy(graph, {})
        raise _StopBeforeRunningError

    monkeypatch.setattr("attnres_compile.kernels.launch.interpreted", lambda: True)
    with pytest.raises(Exception, match="stop here"):
        captured(lambda t: network(t, BLOCKS), tensors(7), change)
    assert implementations(graphs[0]) == {"triton"}


class _StopBeforeRunningError(Exception):
    def __init__(self) -> None:
        super().__init__("stop here")
