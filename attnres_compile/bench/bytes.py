"""Bytes per token that a block moves, counted in the interpreter, through the whole backend.

A hand-written model is compiled with ``backend="attnres"``: single-sublayer blocks that complete
sources, the block that is measured, and one more like it. Counted are the block's kernels (phase
1, phase 2 of its sites, completion of its sum), and whatever else Inductor schedules between its
sublayers: not one row if everything was fused.

Triton reads TRITON_INTERPRET when it is imported, so the count runs in a process of its own:
``python -m attnres_compile.bench.bytes`` with a `Case` as JSON.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from attnres_compile.bench.child import found_by, say_found
from attnres_compile.bench.machine import machine
from attnres_compile.bench.peers import peers
from attnres_compile.bench.residual_model import ResidualModel, listeners
from attnres_compile.errors import BackendError, InputError

DTYPES = ("bfloat16", "float16", "float32")
INTERPRETING = {
    "TRITON_INTERPRET": "1",
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",  # what Inductor computes is seen as it compiles
    "TORCH_LOGS": "inductor_metrics",
}


@dataclass(frozen=True)
class Case:
    """What is counted.

    Attributes:
        completed: sources that the measured block finds completed; more than 2, as fewer are not
            computed in two phases.
        sublayers: of the measured block.
        width: channels of a row.
        dtype: of the residual stream.
        tokens: enough for what is kept per program not to dominate.
        norm: "rms" or "layer", what reads a mix.
    """

    completed: int
    sublayers: int
    width: int
    dtype: str = "bfloat16"
    tokens: int = 512
    norm: str = "rms"

    def check(self) -> None:
        """Raises InputError if there is no such block in two phases."""
        if self.completed < 3 or self.sublayers < 2:
            raise InputError(
                "a block of two phases has at least 3 completed sources and 2 sublayers; with "
                "fewer, each site is computed in one pass."
            )
        if self.width < 1 or self.tokens < 1:
            raise InputError("width and tokens must be positive.")

    @property
    def row(self) -> int:
        """Bytes of one row of all tokens."""
        return self.tokens * self.width * getattr(torch, self.dtype).itemsize  # type: ignore[no-any-return]


def measure(case: Case) -> dict[str, Any]:
    """Counts in a child process, and puts the peers' formulas beside the result."""
    case.check()
    module = ("-m", "attnres_compile.bench.bytes", json.dumps(asdict(case)))
    found = found_by(*module, environment=INTERPRETING)
    rivals = [asdict(peer) for peer in peers(case.completed, case.sublayers)]
    return {**asdict(case), **found, "peers": rivals, "machine": machine()}


def count(case: Case) -> dict[str, Any]:
    """Rows per token of one block, forward and backward; in a process that interprets kernels."""
    from torch._inductor import metrics

    dtype = getattr(torch, case.dtype)
    torch.manual_seed(0)
    before, size = case.completed - 1, case.sublayers
    model = ResidualModel([1] * before + [size, size], case.width, norm=case.norm).to(dtype)
    options: dict[str, Any] = {"kernels": "triton"}
    compiled = torch.compile(model, backend="attnres", fullgraph=True, options=options)
    root = torch.randn(case.tokens, case.width).to(dtype).requires_grad_()
    found: dict[str, Any] = {}
    for direction in ("forward", "backward"):
        metrics.nodes_num_elem.clear()
        with _Counting(range(before, before + size), direction == "backward") as counting:
            if direction == "forward":
                output = compiled(root)
            else:
                output.backward(torch.randn(output.shape).to(dtype))
        nodes = [node for node, _ in metrics.nodes_num_elem]
        rest = _bytes_of_inductor(nodes, counting.block, case.row)
        found[f"{direction}_rows"] = round((sum(counting.kernels.values()) + rest) / case.row, 3)
        kernels = {name: round(b / case.row, 3) for name, b in counting.kernels.items()}
        found[direction] = {
            "kernels": kernels,
            "launches": dict(counting.launches),
            "inductor": round(rest / case.row, 3),
        }
    return found


class _Counting:
    """Which launches are the block's: told by where its sublayers run.

    Forward, a block's phase 1 runs just before its first sublayer, a site's phase 2 before the
    sublayer, and its sum is completed after its last one. The backward pass runs the other way
    round. Sums of partials belong to the kernel that left them.
    """

    def __init__(self, block: range, backward: bool) -> None:
        self.block = block
        self.kernels: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self._backward = backward
        self._after = block.stop + 1 if backward else -1  # the sublayer that ran last
        self._owner = ""
        self._running = ""  # the block's kernel that runs
        self._seen: Counter[str] = Counter()

    def __enter__(self) -> _Counting:
        from attnres_compile.kernels import launch
        from attnres_compile.kernels.traffic import count_traffic

        self._context = count_traffic()
        self._traffic = self._context.__enter__()
        launch.observers.append(self._launched)
        listeners.append(self._ran)
        return self

    def __exit__(self, *error: Any) -> None:
        from attnres_compile.kernels import launch

        self._close()
        listeners.remove(self._ran)
        launch.observers.remove(self._launched)
        self._context.__exit__(*error)

    def _ran(self, number: int, backward: bool) -> None:
        self._close()
        if backward == self._backward:
            self._after = number

    def _launched(self, kernel: Any, _arguments: Mapping[str, Any]) -> None:
        self._close()
        if kernel.template != "sum_partials":
            self._owner = kernel.template
        self._running = kernel.template if self._belongs() else ""

    def _close(self) -> None:
        """Gives what was counted since the last launch to the kernel that ran."""
        now: Counter[str] = Counter(self._traffic.by_kernel())
        if name := self._running:
            self.kernels[name] += now[name] - self._seen[name]
            self.launches[name] += 1
        self._seen, self._running = now, ""

    def _belongs(self) -> bool:
        """Whether a kernel is the block's, from which sublayer ran before it."""
        first, last = self.block[0], self.block[-1]
        completes = self._owner.startswith("complete")
        if self._backward:
            return self._after == last + 1 if completes else first <= self._after <= last
        return self._after == last if completes else first - 1 <= self._after < last


def _bytes_of_inductor(nodes: Sequence[Any], block: range, row: int) -> int:
    """What else Inductor schedules for a block moves: everything but the kernels and sublayers.

    All that stands from the block's phase 1 to the next one's counts, scalars per token and vectors
    too, as they do in the kernels. Beyond, up to the neighbours' sublayers, small things belong to
    other kernels, such as the completion of other sources; a loop over rows would be a lost fusion
    and counts there as well. The numbers beside the nodes in Inductor's metrics are bytes // 4,
    whatever their name says, so each node is asked again.
    """
    numbers = [_sublayer_of(node) for node in nodes]
    around = [i for i, k in enumerate(numbers) if k in (block[0] - 1, block[-1] + 1)]
    if len(around) != 2:
        raise BackendError("the sublayers of the block were not found in Inductor's schedule.")
    inside = nodes[around[0] + 1 : around[1]]
    phase1 = [i for i, node in enumerate(inside) if "phase1" in _operator(node)]
    if len(phase1) != 2:
        raise BackendError("the block and the next one are not both computed in two phases.")
    sizes = [0 if _operator(node) else node.get_read_write_buffers_sizes() for node in inside]
    return sum(n for i, n in enumerate(sizes) if n >= row or phase1[0] < i < phase1[1])


def _operator(node: Any) -> str:
    """The operator of ours that a node calls: the kernels, counted as they run, or a sublayer."""
    name = str(getattr(node.node, "op_overload", ""))
    return name if name.startswith(("attnres.", "attnres_bench.")) else ""


def _sublayer_of(node: Any) -> int | None:
    """The number of the sublayer that a node of Inductor's schedule calls, if it does."""
    if not _operator(node).startswith("attnres_bench."):
        return None
    return next(a for a in node.node.constant_args if isinstance(a, int))


def main(case: str) -> None:
    """Says what is counted for a `Case` in JSON."""
    say_found(count(Case(**json.loads(case))))


if __name__ == "__main__":
    main(sys.argv[1])
