"""Counting what kernels load and store, in Triton's interpreter.

Every load and store of the interpreter passes through three functions, which are wrapped while a
count is running; the bytes of lanes that are not masked out add up per kernel and per argument.
How often a GPU's caches answer instead of its memory is not modelled: a row that is read twice
counts twice. Nor are the block sizes a GPU's: what a program reads once for all of its tokens
(queries, norm weights) counts once per interpreted block, which is larger. So these, "vector"
arguments, are kept apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from attnres_compile.errors import BackendError
from attnres_compile.kernels import launch
from attnres_compile.kernels.codegen import Kind, Specialisation


@dataclass
class Traffic:
    """Bytes by kernel, kind of argument ("row", "vector", "statistic") and direction.

    Attributes:
        loaded: bytes loaded, by (kernel, kind).
        stored: bytes stored, by (kernel, kind).
        launches: how often each kernel ran.
    """

    loaded: Counter[tuple[str, Kind]] = field(default_factory=Counter)
    stored: Counter[tuple[str, Kind]] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)

    def bytes(self, *kinds: Kind) -> int:
        """Everything loaded and stored through arguments of ``kinds``, or of any kind."""
        both = self.loaded + self.stored
        return sum(count for (_, kind), count in both.items() if not kinds or kind in kinds)

    def by_kernel(self, *kinds: Kind) -> dict[str, int]:
        """The same for each kernel."""
        found: Counter[str] = Counter()
        for (kernel, kind), count in (self.loaded + self.stored).items():
            if not kinds or kind in kinds:
                found[kernel] += count
        return dict(found)


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what all launches inside load and store; they must be interpreted.

    Example::

        with count_traffic() as traffic:
            model(inputs)
        print(traffic.bytes("row") / (tokens * row_bytes))
    """
    if not launch.interpreted():
        raise BackendError("traffic is counted in the interpreter; set TRITON_INTERPRET=1.")
    from triton.runtime.interpreter import InterpreterBuilder

    traffic = Traffic()
    running = _Running(traffic)
    originals = {
        name: getattr(InterpreterBuilder, name)
        for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw")
    }

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        running.count(traffic.loaded, pointers, mask)
        return originals["create_masked_load"](self, pointers, mask, *rest)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        running.count(traffic.stored, pointers, mask)
        return originals["create_masked_store"](self, pointers, value, mask, *rest)

    def atomic(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        running.count(traffic.loaded, pointers, mask)
        running.count(traffic.stored, pointers, mask)
        return originals["create_atomic_rmw"](self, operation, pointers, value, mask, *rest)

    InterpreterBuilder.create_masked_load = masked_load
    InterpreterBuilder.create_masked_store = masked_store
    InterpreterBuilder.create_atomic_rmw = atomic
    launch.observers.append(running.begin)
    try:
        yield traffic
    finally:
        launch.observers.remove(running.begin)
        for name, original in originals.items():
            setattr(InterpreterBuilder, name, original)


class _Running:
    """Which memory belongs to which argument of the kernel that is running."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic
        self.kernel = ""
        self.regions: list[tuple[int, int, Kind]] = []

    def begin(self, kernel: Specialisation, arguments: Mapping[str, launch.Argument]) -> None:
        self.kernel = kernel.template
        self.traffic.launches[self.kernel] += 1
        self.regions = []
        for parameter in kernel.parameters:
            tensor = arguments[parameter.name]
            if isinstance(tensor, Tensor):
                start = tensor.data_ptr()
                stop = start + tensor.numel() * tensor.element_size()
                self.regions.append((start, stop, parameter.kind))

    def count(self, counter: Counter[tuple[str, Kind]], pointers: Any, mask: Any) -> None:
        live = int(mask.data.sum())
        if not live:
            return
        size = pointers.get_element_ty().primitive_bitwidth // 8
        address = int(pointers.data.flat[mask.data.argmax()])
        kind = next(kind for start, stop, kind in self.regions if start <= address < stop)
        counter[self.kernel, kind] += live * size
