"""Broken ``.onnx`` files, and records in them that lie: one sentence, and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from attnres_compile import AttnResConfig
from attnres_compile.checkpoint import onnx as onnx_conversion
from attnres_compile.checkpoint import onnx_files
from attnres_compile.checkpoint.onnx import convert_file, plan_file, strip_file
from attnres_compile.errors import (
    CheckpointError,
    OutputError,
    UnsafeFileError,
)
from onnx_cases import chain, remember_as_original, save, save_external

DEFAULT = AttnResConfig()


def damaged(plain: Path, change: Callable[[onnx.ModelProto], Any]) -> Path:
    model = onnx.load(plain)
    change(model)
    return save(model, plain.with_name("damaged.onnx"))


def one_sentence(error: BaseException) -> bool:
    text = str(error)
    return "\n" not in text and text.endswith(".") and len(text) < 420


@pytest.mark.parametrize("size", [0, 1, 100, 700, 1100])
def test_cut_off(plain: Path, size: int) -> None:
    plain.write_bytes(plain.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"plain\.onnx is no (valid )?ONNX model") as caught:
        plan_file(plain, DEFAULT, {})
    assert one_sentence(caught.value)


def test_something_else(tmp_path: Path) -> None:
    path = tmp_path / "noise.onnx"
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(CheckpointError, match=r"noise\.onnx is no ONNX model"):
        plan_file(path, DEFAULT, {})


def _cycle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "x2"


def _unmade(model: onnx.ModelProto) -> None:
    model.graph.node[1].input[1] = "gone"


def _unknown_operator(model: onnx.ModelProto) -> None:
    del model.graph.node[1].input[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_cycle, r"/layers\.0/norm/LayerNormalization .*reads 'x2', .*the graph is cyclic"),
        (_unmade, r"/layers\.0/MatMul \(MatMul\) reads 'gone', which nothing makes"),
        (_unknown_operator, "is no valid ONNX model"),
    ],
)
def test_broken_graph(plain: Path, change: Any, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        plan_file(damaged(plain, change), DEFAULT, {})
    assert one_sentence(caught.value)


def external(tmp_path: Path, **entries: str) -> Path:
    """A model with external weights, some entries of the first of which are replaced."""
    path = save_external(chain(), tmp_path / "folder" / "model.onnx")
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        entry.value = entries.get(entry.key, entry.value)
    return save(model, path)


@pytest.mark.parametrize(
    ("entries", "error", "words"),
    [
        ({"location": "gone.data"}, CheckpointError, "'gone.data', which is missing"),
        ({"location": "../outside.data"}, UnsafeFileError, "leads out of its directory"),
        ({"location": "/etc/hostname"}, UnsafeFileError, "leads out of its directory"),
        ({"location": "..\\outside.data"}, UnsafeFileError, "leads out of its directory"),
        ({"location": "C:\\weights"}, UnsafeFileError, "leads out of its directory"),
        ({"location": "link.data"}, UnsafeFileError, "a link that leads out"),
        ({"location": ""}, UnsafeFileError, "leads out of its directory"),
        ({"offset": "700"}, CheckpointError, "bytes 700 to 956 of 768"),
        ({"offset": "-4"}, CheckpointError, "cut off or another's"),
        ({"length": "12"}, CheckpointError, "where 256 bytes should be"),
        ({"offset": "many"}, CheckpointError, "at no valid place"),
    ],
)
def test_external_weights_at_a_bad_place(
    tmp_path: Path, entries: dict[str, str], error: type[Exception], words: str
) -> None:
    (tmp_path / "outside.data").write_bytes(b"\0" * 4096)
    path = external(tmp_path, **entries)
    (path.parent / "link.data").symlink_to(tmp_path / "outside.data")
    out = tmp_path / "out.onnx"
    with pytest.raises(error, match=words) as caught:
        convert_file(path, out, DEFAULT, {})
    assert one_sentence(caught.value)
    assert not out.exists()


def test_a_good_place_is_no_error(tmp_path: Path) -> None:
    path = external(tmp_path)
    (path.parent / "inside.data").symlink_to("weights.data")
    assert plan_file(path, DEFAULT, {}).num_residual_additions == 3


def test_a_tensor_that_holds_too_little(plain: Path) -> None:
    def cut(model: onnx.ModelProto) -> None:
        scale = next(t for t in model.graph.initializer if t.name == "scale")
        scale.raw_data = scale.raw_data[:-3]

    with pytest.raises(CheckpointError, match=r"scale.* does not hold|no valid ONNX model"):
        plan_file(damaged(plain, cut), DEFAULT, {})


def _metadata(path: Path, key: str, value: str) -> None:
    model = onnx.load(path)
    for each in model.metadata_props:
        each.value = value if each.key == key else each.value
    save(model, path)


@pytest.mark.parametrize("text", ["", "{}", '{"model": "eJw=", "blank": [], "sha256": ""}', "[1"])
def test_damaged_record_of_the_original(converted: Path, text: str) -> None:
    _metadata(converted, onnx_conversion.ORIGINAL, text)
    back = converted.with_name("back.onnx")
    with pytest.raises(CheckpointError, match="the record of the original model is damaged"):
        strip_file(converted, back)
    assert not back.exists()


def test_a_record_that_unfolds_without_end(
    converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_conversion, "_LARGEST_ORIGINAL", 100)
    with pytest.raises(CheckpointError, match="too large or cut off"):
        strip_file(converted, converted.with_name("back.onnx"))


def test_an_original_that_points_outside(tmp_path: Path) -> None:
    """The record of the original is as untrusted as the file around it."""
    path = save_external(chain(), tmp_path / "in" / "plain.onnx")
    converted = tmp_path / "in" / "converted.onnx"
    convert_file(path, converted, DEFAULT, {})
    bad = onnx.load(path, load_external_data=False)
    for entry in bad.graph.initializer[0].external_data:
        entry.value = "../../etc/passwd" if entry.key == "location" else entry.value
    model = onnx.load(converted, load_external_data=False)
    remember_as_original(model, onnx_conversion._remember(bad, bad))
    save(model, converted)
    with pytest.raises(UnsafeFileError, match="leads out of its directory"):
        strip_file(converted, tmp_path / "back.onnx")


def test_nothing_is_left_of_a_failed_write(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    folder = tmp_path / "out"
    folder.mkdir()
    external = save_external(chain(), tmp_path / "in" / "plain.onnx")
    monkeypatch.setattr(onnx_files, "copy_file", full)
    with pytest.raises(OutputError, match="the disk is full"):
        convert_file(external, folder / "out.onnx", DEFAULT, {})
    assert list(folder.iterdir()) == []
