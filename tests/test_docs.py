"""The tutorial runs as it stands: every block of every page, in order, page by page."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from attnres_compile.cli import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("[0-9]*.md"))
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(ROOT / "examples" / "stdlib-llama", tmp_path / "examples" / "stdlib-llama")
    monkeypatch.chdir(tmp_path)
    blocks = _BLOCK.findall(page.read_text())
    namespace: dict[str, object] = {"__name__": page.stem}
    for language, text in blocks:
        if language == "python":
            exec(compile(text, page.name, "exec"), namespace)
        else:
            assert language == "console"
            run_commands(text)
    assert {language for language, _ in blocks} <= {"python", "console"}
    assert len(blocks) >= 4


def shorten(checkpoint: Path, result: Path, layers: int = 8) -> None:
    """The example with the first of its layers: the same blocks at a size that CI can afford."""
    shutil.copytree(checkpoint, result)
    config = json.loads((result / "config.json").read_text())
    assert layers < config["num_hidden_layers"]
    (result / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    above = tuple(f"model.layers.{i}." for i in range(layers, config["num_hidden_layers"]))
    weights = load_file(checkpoint / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith(above)}
    save_file(kept, result / "model.safetensors", {"format": "pt"})


def run_commands(text: str) -> None:
    for line in text.splitlines():
        assert line.startswith("$ attnres-compile "), line
        assert main(shlex.split(line)[2:]) == 0, line


def test_there_are_three_pages_that_lead_to_each_other() -> None:
    assert len(PAGES) == 3
    for page, following in zip(PAGES, [*PAGES[1:], PAGES[0]], strict=True):
        assert f"]({following.name})" in page.read_text()


def test_figures_are_those_of_the_kept_files() -> None:
    page = (ROOT / "docs" / "3-how-it-works.md").read_text()
    cpu, bytes_moved, aot = (
        json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        for name in ("cpu", "bytes", "aot")
    )
    assert f"medians of {cpu['pairs']} pairs" in page
    for shape in cpu["shapes"].values():
        for mode in ("inference", "training"):
            keys = (f"{mode}_ratio", f"eager_{mode}_ratio", f"naive_{mode}_ratio")
            row = " | ".join([mode, *(f"{shape[key]:.3f}" for key in keys)])
            assert f"| {row} |" in page
    low, _, high = cpu["shapes"]["b"]["training_quartiles"]
    assert re.search(rf"between\s+{low:.3f} and {high:.3f}", page)
    assert (bytes_moved["sublayers"], bytes_moved["completed"]) == (6, 8)
    forward, backward = (round(bytes_moved[f"{way}_rows"]) for way in ("forward", "backward"))
    assert f"moves {forward} rows forward and {backward} backward" in page
    assert (aot["width"], aot["spills"]) == (4096, 0)
