"""Let the C++ phases write over what nobody reads after them.

A phase has read a row by the time it writes those that are made of it, so its results can go where
its arguments were: to lines that are in the cache already, and not to memory that has to be found
first. Inductor does this for loops that it generates itself.

Contract: values are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from attnres_compile.passes.cpp_calls import arguments_of, phase_of
from attnres_compile.passes.storages import Storages


def write_in_place(graph: fx.Graph) -> None:
    """Rewrites, in place, a sorted ATen graph with the operators of ``cpp_library.py``."""
    calls = [node for node in graph.nodes if phase_of(node) is not None]
    storages = Storages(graph)
    for call in calls:
        for room, candidates in _results(call):
            old = next((each for each in candidates if storages.may_hold(room, each, call)), None)
            if old is not None:
                storages.unite(room, old)
                room.replace_all_uses_with(old)
                graph.erase_node(room)


def _results(call: fx.Node) -> Iterator[tuple[Any, list[Any]]]:
    """What a call writes to, and the arguments of which it has read a row before it writes it."""
    given = arguments_of(call)
    if phase_of(call) == "complete":
        yield given["source"], [given["first"], given["second"]]
    elif phase_of(call) == "complete_backward":
        yield given["grad"], [given["grad_source"]]
    elif phase_of(call) == "phase1_backward":
        carriers = dict(zip(given["arrived"], given["grad_carriers"], strict=True))
        for room, source in zip(given["grads"], given["wanted"], strict=True):
            yield room, [carriers.get(source)]
    elif phase_of(call) == "phase2":
        yield given["partial"], [*given["direct"][-1:], given["branch"]]
        yield given["mixed"], [given["branch"], given["before"]]
        yield given["normed"], [given["branch"], given["before"]]
    elif phase_of(call) == "phase2_backward":
        rooms = dict(zip(given["wanted"], given["grads"], strict=True))
        yield rooms.get(given["count"] - 1), [given["grad_partial"]]
        yield given["grad_before"], [given["grad_normed"]]
