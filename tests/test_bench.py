"""The benchmarks of the command line: small ones, since what counts here is that they are right."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnres_compile.bench import bytes as bench_bytes
from attnres_compile.bench import child, cpu, cpu_times, gpu
from attnres_compile.bench.child import found_by
from attnres_compile.bench.decoder import SHAPES, models
from attnres_compile.bench.peers import peers
from attnres_compile.bench.residual_model import ResidualModel, attnres_mix
from attnres_compile.cli import main, parser
from attnres_compile.errors import BackendError
from attnres_compile.kernels import reference

FLAGS = {
    "bytes": "completed sublayers width tokens dtype norm",
    "aot": "width sources sites dtype targets kernels",
    "cpu": "shapes modes pairs processes",
    "gpu": "width blocks sublayers tokens runs",
}


def results(path: Path, *argv: str) -> dict[str, Any]:
    assert main(["bench", *argv, "--json", str(path)]) == 0
    found: dict[str, Any] = json.loads(path.read_text())
    assert found["machine"]["torch"] == torch.__version__.partition("+")[0]
    return found


@pytest.mark.slow
def test_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows are those of the kernels by themselves: test_traffic.py counts the same."""
    n, s = 3, 3
    case = ("--completed", str(n), "--sublayers", str(s), "--width", "64", "--dtype", "float32")
    found = results(tmp_path / "bytes.json", "bytes", *case)
    forward, backward = found["forward"], found["backward"]
    assert forward["launches"] == {
        "phase1_weights": 1,
        "phase1_forward": 1,
        "phase2_forward": s,
        "complete_forward": 1,
    }
    assert backward["launches"]["phase2_backward"] == s
    assert backward["launches"]["phase1_backward"] == 1
    assert backward["launches"]["complete_backward"] == 1
    # Two scalars per token and site are gathered for phase 1, read and written: no loop over rows.
    assert forward["inductor"] == 0
    assert backward["inductor"] == pytest.approx(4 * s / 64, abs=1e-3)
    # Scalars per token and vectors are a tenth of a row each, at this width.
    rows = {name: int(moved) for name, moved in forward["kernels"].items()}
    assert rows["phase1_forward"] == n + s
    assert rows["phase2_forward"] == 2 + 3 + 5 * (s - 2)
    assert rows["complete_forward"] == 3
    least = 2 + 3 + 5 * (s - 2) + n + s + 3
    assert least < found["forward_rows"] < least + 2
    least = n - 1 + s + 2 * n + 3 + 6 * (s - 1) + 3
    assert least < found["backward_rows"] < least + 4
    assert "attnres, counted" in capsys.readouterr().out


@pytest.mark.slow
def test_bytes_see_a_lost_fusion() -> None:
    """The twin of test_bytes: nothing is moved into the sites, and Inductor's loops are seen.

    Forward, a norm reads and writes a row, an addition reads two and writes one; the first addition
    comes after the second sublayer, the last one is in the completion. Backward, a norm's input
    takes three rows and its weight two more, as the sum over tokens is a loop of its own; a partial
    sum that is both mixed and added to has two gradients to add. The norm after the block is seen.
    """
    s = 3
    script = (
        "from attnres_compile.bench import bytes; from attnres_compile.passes import lower;"
        "lower.fuse_neighbours = lambda graph: None;"
        f"bytes.main('{json.dumps(asdict(bench_bytes.Case(3, s, 64, 'float32')))}')"
    )
    found = found_by("-c", script, environment=bench_bytes.INTERPRETING)
    forward, backward = found["forward"]["inductor"], found["backward"]["inductor"]
    scalars = 0.1  # a norm's root, and a vector of weights; those of test_bytes besides
    rows = 2 * (s + 1) + 3 * (s - 2)
    assert rows < forward < rows + scalars
    rows = 5 * (s + 1) + 3 * (s - 1)
    assert rows + 4 * s / 64 < backward < rows + 4 * s / 64 + 2 * scalars


CHILD = "from attnres_compile.bench.child import say_found, say_step; "


def test_a_child_says_what_it_found_and_each_step() -> None:
    ticks: list[int] = []
    script = CHILD + "print('and'); say_step(); say_step(); say_found({'it': 3}); print('more')"
    found = found_by("-c", script, environment={}, tick=lambda: ticks.append(1))
    assert (found, len(ticks)) == ({"it": 3}, 2)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        # PyTorch's hints stand after the error.
        ("sys.exit('x()\\nTypeError: no x\\n\\nSet TORCH_LOGS')", "failed: TypeError: no x$"),
        ("sys.exit('a.Unsupported: no\\n  Hint: try')", "failed: a.Unsupported: no$"),
        ("sys.exit('W11 a.py: careful')", "failed: W11 a.py: careful$"),
        (
            "sys.stderr.buffer.write(b'\\xff no'); sys.exit(1)",
            "failed: \ufffd no$",
        ),
        ("sys.exit(1)", "failed: it said nothing$"),
        ("pass", "failed: it said nothing$"),
        ("import os; os.kill(os.getpid(), 9)", r"failed: it was killed by SIGKILL; .* memory\.$"),
    ],
)
def test_a_child_says_why_it_failed(script: str, said: str) -> None:
    with pytest.raises(BackendError, match=said):
        found_by("-c", f"import sys; {script}", environment={})


def test_an_interrupt_leaves_no_child_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[subprocess.Popen[str]] = []

    class Watched(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            children.append(self)

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Watched)
    script = CHILD + "say_step(); import time; time.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        found_by("-c", script, environment={}, tick=interrupt)
    assert children[0].wait(10) == -signal.SIGKILL


def test_peers() -> None:
    """The tables of the peers' report, for 8 sources with 6 sites."""
    rows = {p.name.partition(",")[0]: (p.forward_rows, p.backward_rows) for p in peers(8, 6)}
    assert rows["Liger"] == (245, 342)
    assert rows["fast-attnres"] == (98, 325)
    assert rows["vLLM and aiter"] == (72, None)
    assert rows["catswe"] == (58, 155)
    assert rows["minimum of two phases"] == (40, 60)


def test_aot(tmp_path: Path) -> None:
    argv = ("--width", "1024", "--targets", "sm_90", "--kernels", "complete")
    (kernel,) = results(tmp_path / "aot.json", "aot", *argv)["kernels"]
    assert (kernel["kernel"], kernel["target"], kernel["spills"]) == ("complete", "sm_90", 0)
    assert kernel["registers"] > 0
    assert kernel["loads"]["16"] > 0


def test_cpu(tmp_path: Path) -> None:
    argv = ("--shapes", "tiny", "--modes", "inference", "--pairs", "3", "--processes", "2")
    found = results(tmp_path / "cpu.json", "cpu", *argv)
    tiny = found["shapes"]["tiny"]
    for key in ("inference_ratio", "compile_ratio", "eager_inference_ratio"):
        assert found[key] == tiny[key] > 0
    assert tiny["inference_compile_seconds"]["plain"] > 0.1, "found in a cache"
    assert (found["pairs"], found["processes"]) == (3, 2)
    assert len(tiny["inference_by_process"]) == 2


def test_ratios_of_steps_are_medians_of_all_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """And each round is a pair: 3/2, 4/4, 9/3 are not the ratio of medians, 4/3."""
    forms = {"plain": [2.0, 4.0], "converted": [3.0, 4.0]}
    eager = {"eager_plain": [1.0, 1.0], "eager_converted": [2.0, 2.0], "eager_naive": [5.0, 5.0]}
    first = {"first_calls": {"plain": 10.0, "converted": 12.0}, "steps": {**forms, **eager}}
    forms = {"plain": [3.0], "converted": [9.0]}
    eager = {"eager_plain": [1.0], "eager_converted": [3.0], "eager_naive": [6.0]}
    second = {"first_calls": {"plain": 10.0, "converted": 8.0}, "steps": {**forms, **eager}}
    children = iter([[first], [second]])
    monkeypatch.setattr(child, "found_by", lambda *_, **__: next(children))
    found = cpu.measure(["tiny"], ["training"], pairs=3, processes=2)
    assert found["training_ratio"] == 1.5
    assert found["compile_ratio"] == 1.0
    assert (found["eager_training_ratio"], found["naive_training_ratio"]) == (2, 5)
    assert found["shapes"]["tiny"]["training_by_process"] == [1.25, 3]
    assert found["shapes"]["tiny"]["training_milliseconds"]["converted"] == 4000


def test_rounds_are_shared_between_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more processes than rounds; the form that is compiled first takes turns."""
    asked: list[dict[str, Any]] = []

    def answer(*arguments: str, **_: object) -> list[dict[str, Any]]:
        asked.append(json.loads(arguments[-1]))
        forms = dict.fromkeys((*cpu_times.COMPILED, *cpu_times.EAGER), [1.0] * asked[-1]["rounds"])
        return [{"first_calls": {"plain": 1.0, "converted": 1.0}, "steps": forms}]

    monkeypatch.setattr(child, "found_by", answer)
    for pairs, processes, rounds in ((21, 3, [7, 7, 7]), (5, 3, [2, 2, 1]), (2, 3, [1, 1])):
        asked.clear()
        found = cpu.measure(["tiny", "tiny"], ["training"], pairs, processes)
        assert [each["rounds"] for each in asked] == rounds
        assert [each["plain_first"] for each in asked] == [True, False, True][: len(rounds)]
        assert found["processes"] == len(rounds)


def test_the_bar_ends_where_the_steps_do() -> None:
    case = (["tiny"], ["inference"], 2, 1)
    ticks: list[int] = []
    cpu.measure(*case, tick=lambda: ticks.append(1))
    assert len(ticks) == cpu.steps_of(*case)


def test_the_compared_networks_compute_the_same() -> None:
    made, ids = models(SHAPES["tiny"])
    expected = made["plain"](ids)
    for name in ("converted", "naive"):
        torch.testing.assert_close(made[name](ids), expected, rtol=1e-4, atol=1e-5)


def test_the_forms_on_a_gpu_compute_the_same() -> None:
    root = torch.randn(5, 16)
    outputs = []
    for mixer in {
        mixer for name, (mixer, _) in gpu.forms().items() if name not in ("Liger", "fla")
    }:
        torch.manual_seed(0)
        outputs.append(ResidualModel([2, 2], 16, mixer)(root))
    torch.testing.assert_close(outputs[0], outputs[1])


def test_fla_is_compared_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in of its signature: fla itself runs on nothing but GPUs."""

    def fused_attnres(
        query: Tensor, residuals: Sequence[Tensor], rms_weight: Tensor, *, rms_eps: float
    ) -> Tensor:
        return reference.mix(residuals, query, rms_weight, eps=rms_eps, aggregate="mean")

    monkeypatch.setitem(sys.modules, "fla.ops.attnres", None)
    assert "fla" not in gpu.forms()
    installed = SimpleNamespace(fused_attnres=fused_attnres)
    monkeypatch.setitem(sys.modules, "fla.ops.attnres", installed)  # type: ignore[arg-type]
    mixer, backend = gpu.forms()["fla"]
    assert backend is None
    sources, query = torch.randn(3, 5, 16).unbind(0), torch.randn(16)
    torch.testing.assert_close(mixer(sources, query), attnres_mix(sources, query))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_gpu_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "gpu"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "bench gpu needs a GPU" in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (("bytes", "--completed", "2"), "at least 3 completed sources"),
        (("aot", "--kernels", "phase 9"), "no kernel is called 'phase 9'"),
        (("cpu", "--pairs", "0"), "must be positive"),
        (("cpu", "--processes", "0"), "must be positive"),
        (("cpu", "--json", "nowhere/x.json"), "is no directory"),
        (("fly",), "invalid choice"),
        ((), "required: WHAT"),
    ],
)
def test_misuse(argv: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *argv]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("bench", FLAGS)
def test_the_flags_are_frozen(bench: str) -> None:
    def choices(of: argparse.ArgumentParser) -> Any:
        assert of._subparsers is not None
        return next(a.choices for a in of._subparsers._group_actions if a.choices)

    actions = choices(choices(parser())["bench"])[bench]._actions
    found = {o[2:] for action in actions for o in action.option_strings if o.startswith("--")}
    assert found == {*FLAGS[bench].split(), *"help json no-color verbose quiet".split()}
