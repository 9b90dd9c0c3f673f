"""Damaged and hostile directories: one sentence, exit code 1 or 2, nothing written, no code run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import attnres_compile
from attnres_compile.cli import main
from checkpoint.damages import Damage, copied, cut, refused, write_good
from checkpoint.models import LLAMA, TOKENS

pytestmark = pytest.mark.timeout(120)  # none hangs


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("good")
    write_good(home)
    return home


def index(change: Callable[[dict[str, str]], Any]) -> Damage:
    def damage(directory: Path) -> None:
        path = directory / "model.safetensors.index.json"
        data = json.loads(path.read_text())
        change(data["weight_map"])
        path.write_text(json.dumps(data))

    return damage


def config(**values: Any) -> Damage:
    def damage(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return damage


def link_out(directory: Path) -> None:
    secret = directory.parent / "secret.safetensors"
    shard = next(directory.glob("model-00001*"))
    shard.rename(secret)
    shard.symlink_to(secret)


def linked_readme(directory: Path) -> None:
    secret = directory.parent / "secret"
    secret.write_text("secret")
    (directory / "NOTES.md").symlink_to(secret)


def first(value: str) -> Damage:
    return index(lambda w: w.update({next(iter(w)): value}))


DIRECTORY: dict[str, Damage] = {
    "no config": lambda d: (d / "config.json").unlink(),
    "config is no JSON": lambda d: (d / "config.json").write_text("{"),
    "config is a list": lambda d: (d / "config.json").write_text("[]"),
    "index is no JSON": lambda d: (d / "model.safetensors.index.json").write_text("nope"),
    "index without a map": lambda d: (d / "model.safetensors.index.json").write_text("{}"),
    "index of numbers": first(3),  # type: ignore[arg-type]
    "index to a missing file": first("model-9.safetensors"),
    "index to the parent": first("../secret.safetensors"),
    "index to a deep path": first("a/../../secret.safetensors"),
    "index to an absolute path": first("/etc/passwd"),
    "index with a wrong shard": index(lambda w: w.update({next(iter(w)): list(w.values())[-1]})),
    "index with a NUL": first("a\0b"),
    "a shard is cut off": lambda d: cut(500)(next(d.glob("model-00001*"))),
    "a shard is missing": lambda d: next(d.glob("model-00001*")).unlink(),
    "a shard is a link to elsewhere": link_out,
    "another file is a link to elsewhere": linked_readme,
    "an unknown model type": config(model_type="unheard_of"),
    "no model type": config(model_type=None),
    "no architecture": config(architectures=None),
    "an architecture that is a function": config(architectures=["pipeline"]),
    "remote code": config(
        architectures=["Mine"], auto_map={"AutoModelForCausalLM": "payload.Mine"}
    ),
    "too many layers": config(num_hidden_layers=10**9),
    "more layers than weights": config(num_hidden_layers=6),
    "width of text": config(hidden_size="wide"),
    "another width": config(hidden_size=64),
    "negative heads": config(num_attention_heads=-1),
}


@pytest.mark.parametrize("name", DIRECTORY)
def test_directory(
    name: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied(good / "plain", tmp_path / "plain")
    (path / "payload.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    DIRECTORY[name](path)
    refused(capsys, path, "convert", str(path), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".*")) == []


def manifest(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(directory: Path) -> None:
        path = directory / "attnres_original" / "manifest.json"
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return damage


def flip(directory: Path) -> None:
    """One bit of one weight; in a copy, since the shard is linked to the original."""
    shard = next(directory.glob("model-00001*"))
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.unlink()
    shard.write_bytes(raw)


CONVERTED: dict[str, Damage] = {
    "a changed weight": flip,
    "a manifest that leads out": manifest(
        lambda m: m["files"].update({"../../evil": {"size": 1, "sha256": None}})
    ),
    "an absolute manifest": manifest(
        lambda m: m["files"].update({"/tmp/evil": {"size": 1, "sha256": None}})
    ),
    "a manifest of numbers": manifest(lambda m: m.update(files=3)),
    "a file that is gone": manifest(
        lambda m: m["files"].update({"gone.txt": {"size": 1, "sha256": None}})
    ),
    "new parameters that are gone": lambda d: (d / "attnres.safetensors").unlink(),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_converted_directory(
    name: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied(good / "converted", tmp_path / "converted")
    CONVERTED[name](path)
    refused(capsys, path, "strip", str(path), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_good_directories_pass(good: Path, tmp_path: Path) -> None:
    assert main(["convert", str(good / "plain"), str(tmp_path / "out"), "-q"]) == 0
    assert main(["strip", str(good / "converted"), str(tmp_path / "back"), "-q"]) == 0


def test_a_layout_of_another_model_is_named_by_site(good: Path, tmp_path: Path) -> None:
    converted = attnres_compile.convert(LLAMA.build(), (), LLAMA.call())
    attnres_compile.save(converted, tmp_path / "new.safetensors", new_only=True)
    shallow = LLAMA.build()
    shallow.model.layers = shallow.model.layers[:2]
    shallow.config.num_hidden_layers = 2

    with pytest.raises(attnres_compile.errors.CheckpointError) as caught:
        attnres_compile.load(tmp_path / "new.safetensors", shallow)

    assert "site before_layers_2_input_layernorm expected at depth 4" in str(caught.value)
    assert "found none in a stream of depth 4" in str(caught.value)
    assert torch.equal(shallow(TOKENS).logits, shallow(TOKENS).logits)
