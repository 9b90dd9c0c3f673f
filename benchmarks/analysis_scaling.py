"""How long planning takes, and how much memory, at the widths of the 405B Llama on the meta device.

    python benchmarks/analysis_scaling.py --layers 16 32 64 126

Each row is measured in a process of its own: capture (by Dynamo, which `plan` uses, or by
torch.export), the analysis of the captured graph (streams and readers), the whole of `plan` after
the capture, and the process's peak memory. Seconds of CPU time stand beside those on the clock,
since the former hardly depend on what else the machine does. Nothing of the model is executed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import fx

RESULTS = Path(__file__).parent / "results" / "analysis_scaling.json"
REPEATS = 5  # of the analysis, which is short; the fastest counts
ROUTES = ("dynamo", "export")
LLAMA_405B = {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


@dataclass(frozen=True)
class Seconds:
    clock: float
    cpu: float


@dataclass(frozen=True)
class Measurement:
    """One model, planned once.

    Attributes:
        nodes: of the captured graph.
        additions: residual additions found; twice the layers.
        peak_bytes: largest resident memory of the process, with PyTorch and the model in it.
    """

    layers: int
    route: str
    nodes: int
    additions: int
    capture: Seconds
    analysis: Seconds
    plan: Seconds
    peak_bytes: int

    @property
    def total(self) -> Seconds:
        """Capture and plan: what a user waits for."""
        return Seconds(self.capture.clock + self.plan.clock, self.capture.cpu + self.plan.cpu)


@contextmanager
def stopwatch() -> Iterator[list[Seconds]]:
    found: list[Seconds] = []
    clock, cpu = time.perf_counter(), time.process_time()
    yield found
    found.append(Seconds(time.perf_counter() - clock, time.process_time() - cpu))


def measure(layers: int, route: str) -> Measurement:
    """Plans one model, in this process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from attnres_compile import AttnResConfig
    from attnres_compile.capture import capture
    from attnres_compile.inputs import infer_inputs
    from attnres_compile.planning import plan_of_capture

    def build(layers: int) -> tuple[Any, Any, Any]:
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**LLAMA_405B, num_hidden_layers=layers))
        return (model, *infer_inputs(model))

    capture(*build(1), route=route)  # type: ignore[arg-type]  # imports what a first capture imports
    model, args, kwargs = build(layers)
    with stopwatch() as captured_in:
        captured = capture(model, args, kwargs, route=route)  # type: ignore[arg-type]
    analyses = [_analysed_in(captured.module.graph) for _ in range(REPEATS)]
    with stopwatch() as planned_in:
        plan = plan_of_capture(captured, model, AttnResConfig())
    return Measurement(
        layers,
        route,
        len(captured.module.graph.nodes),
        plan.num_residual_additions,
        captured_in[0],
        min(analyses, key=lambda seconds: seconds.cpu),
        planned_in[0],
        _peak_bytes(),
    )


def _analysed_in(graph: fx.Graph) -> Seconds:
    from attnres_compile.passes.classify_readers import classify_readers
    from attnres_compile.passes.find_streams import find_streams

    with stopwatch() as found:
        for stream in find_streams(graph).streams:
            for site in stream.sites:
                classify_readers(site)
    return found[0]


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure_apart(layers: int, route: str) -> Measurement:
    """Plans one model in a process of its own."""
    command = [sys.executable, __file__, "--layers", str(layers), "--routes", route, "--print"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{layers} layers by {route} failed:\n{done.stderr}")
    return from_json(json.loads(done.stdout.splitlines()[-1]))


def from_json(data: dict[str, Any]) -> Measurement:
    timed = {"capture", "analysis", "plan"}
    values = {f.name: data[f.name] for f in fields(Measurement)}
    return Measurement(**{n: Seconds(**v) if n in timed else v for n, v in values.items()})


def show(measurements: Sequence[Measurement]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    title = "Planning a Llama with the widths of the 405B model, on the meta device"
    table = Table(title=title, box=SIMPLE, padding=(0, 1))
    table.add_column("route\n")
    for name in (
        "layers\n",
        "nodes\n",
        "capture\nCPU s",
        "analysis\nCPU s",
        "a layer\nCPU ms",
        "total\nCPU s",
        "total\nclock s",
        "peak\nGB",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for m in measurements:
        table.add_row(
            m.route,
            str(m.layers),
            f"{m.nodes:,}",
            f"{m.capture.cpu:.1f}",
            f"{m.analysis.cpu:.2f}",
            f"{1000 * m.analysis.cpu / m.layers:.1f}",
            f"{m.total.cpu:.1f}",
            f"{m.total.clock:.1f}",
            f"{m.peak_bytes / 1e9:.2f}",
        )
    Console(width=100).print(table)


def write(measurements: Sequence[Measurement], path: Path) -> None:
    import torch
    import transformers

    result = {
        "model": LLAMA_405B,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "load": os.getloadavg()[0],
        "measurements": [asdict(m) for m in measurements],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[16, 32, 64, 126])
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=list(ROUTES))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--print", action="store_true", help="one row, in this process, as JSON")
    options = parser.parse_args()
    if options.print:
        print(json.dumps(asdict(measure(options.layers[0], options.routes[0]))))
        return
    measurements = []
    for route in options.routes:
        for layers in options.layers:
            measurements.append(measure_apart(layers, route))
            print(f"{route}, {layers} layers: {measurements[-1].total.clock:.1f} s", flush=True)
    show(measurements)
    write(measurements, options.output)


if __name__ == "__main__":
    main()
