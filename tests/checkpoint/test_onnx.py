"""``.onnx`` files: there and back, external weights, and the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from attnres_compile import AttnResConfig, load
from attnres_compile.checkpoint import onnx as onnx_conversion
from attnres_compile.checkpoint.onnx import convert_file, plan_file, read_record, strip_file
from attnres_compile.cli import main
from attnres_compile.errors import (
    AlreadyConvertedError,
    InputError,
    NothingToConvertError,
    OutputExistsError,
)
from attnres_compile.onnx_verification import verify_files
from onnx_cases import Program, chain, remember_as_original, save, save_external

DEFAULT = AttnResConfig()


def with_queries(path: Path, number: float) -> None:
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name.endswith(".query"):
            value = np.linspace(-number, number, tensor.dims[0], dtype=np.float32)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    save(model, path)


@pytest.mark.parametrize("inline", [False, True])
def test_there_and_back(plain: Path, inline: bool) -> None:
    converted, back = plain.with_name("converted.onnx"), plain.with_name("back.onnx")
    plan = convert_file(plain, converted, DEFAULT, {}, inline=inline)
    onnx.checker.check_model(str(converted), full_check=True)
    model = onnx.load(converted)
    domains = {node.domain for node in model.graph.node}
    assert (len(model.functions), domains) == ((0, {""}) if inline else (3, {"", "attnres"}))
    assert {o.domain for o in model.opset_import} == domains
    assert read_record(converted).plan == plan  # type: ignore[union-attr]
    assert "SHA-256 recorded" in strip_file(converted, back)
    assert onnx.load(back) == onnx.load(plain)
    assert back.read_bytes() == plain.read_bytes()


def test_strip_keeps_weights_that_were_trained_afterwards(plain: Path, converted: Path) -> None:
    model = onnx.load(converted)
    for tensor in model.graph.initializer:
        if tensor.name == "layers.1.weight":
            weight = np.full((8, 8), 7, np.float32)
            tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    save(model, converted)
    back = plain.with_name("back.onnx")
    assert "weights were changed" in strip_file(converted, back)
    stripped, original = onnx.load(back), onnx.load(plain)
    assert stripped.graph.node == original.graph.node
    new = {t.name: numpy_helper.to_array(t) for t in stripped.graph.initializer}
    old = {t.name: numpy_helper.to_array(t) for t in original.graph.initializer}
    assert list(new) == list(old)
    assert (new["layers.1.weight"] == 7).all()
    assert (new["layers.0.weight"] == old["layers.0.weight"]).all()


def test_weights_are_stored_once(plain: Path, tmp_path: Path) -> None:
    wide = save(chain(2, 256), tmp_path / "wide.onnx")
    converted = tmp_path / "wide_converted.onnx"
    convert_file(wide, converted, DEFAULT, {})
    new = 2 * 2 * 256 * 4  # two sites, query and gain
    assert converted.stat().st_size < wide.stat().st_size + new + 30_000
    assert wide.stat().st_size > 2 * 256 * 256 * 4


def test_a_weight_that_converting_changed_is_remembered(plain: Path, converted: Path) -> None:
    """As the upgrade of old operators may; then the original's is not the one in the file."""
    original, model = onnx.load(plain), onnx.load(converted)
    changed = numpy_helper.from_array(np.full((8, 8), 7, np.float32), "layers.0.weight")
    model.graph.initializer[0].CopyFrom(changed)
    remember_as_original(model, onnx_conversion._remember(original, model))
    save(model, converted)
    strip_file(converted, plain.with_name("back.onnx"))
    assert onnx.load(plain.with_name("back.onnx")) == original


def test_verify(plain: Path, converted: Path) -> None:
    assert verify_files(converted, plain).passed
    report = verify_files(converted)  # against the original that it holds
    assert (report.passed, report.num_sites) == (True, 3)
    assert [c.name for c in report.comparisons] == ["y"]
    with_queries(converted, 1.0)
    trained = verify_files(converted, plain)
    assert not trained.passed
    assert any("3 are not zero" in note for note in trained.notes)


def test_verify_sees_another_original(plain: Path, converted: Path, tmp_path: Path) -> None:
    model = onnx.load(plain)
    weight = numpy_helper.to_array(model.graph.initializer[0]) * np.float32(1.001)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "layers.0.weight"))
    assert not verify_files(converted, save(model, tmp_path / "other.onnx")).passed


def test_verify_of_a_file_that_was_not_converted(plain: Path) -> None:
    with pytest.raises(InputError, match="has no Attention Residuals; convert it first"):
        verify_files(plain)


def test_converted_twice(converted: Path) -> None:
    with pytest.raises(AlreadyConvertedError, match="has Attention Residuals already"):
        convert_file(converted, converted.with_name("again.onnx"), DEFAULT, {})


def test_nothing_to_convert_writes_nothing(tmp_path: Path) -> None:
    program = Program()
    path = save(program.model(program("Tanh", "x")), tmp_path / "tanh.onnx")
    with pytest.raises(NothingToConvertError, match=r"tanh\.onnx has no residual stream"):
        convert_file(path, tmp_path / "out.onnx", DEFAULT, {})
    assert [each.name for each in tmp_path.iterdir()] == ["tanh.onnx"]


def test_an_output_that_exists(plain: Path, converted: Path) -> None:
    with pytest.raises(OutputExistsError, match="exists already"):
        convert_file(plain, converted, DEFAULT, {})
    convert_file(plain, converted, DEFAULT, {}, overwrite=True)


def test_older_operators_are_brought_up_to_date(tmp_path: Path) -> None:
    program = Program()
    x = "x"
    for _ in range(2):
        x = program("Add", x, program.f(program("Tanh", x)))
    model = program.model(x)
    model.opset_import[0].version = 13
    model.ir_version = 7
    old = save(model, tmp_path / "old.onnx")
    converted = tmp_path / "converted.onnx"
    convert_file(old, converted, DEFAULT, {})
    result = onnx.load(converted)
    assert (result.ir_version, result.opset_import[0].version) == (8, 17)
    assert verify_files(converted, old).passed
    strip_file(converted, tmp_path / "back.onnx")
    assert onnx.load(tmp_path / "back.onnx") == model


def test_older_operators_with_external_weights_are_refused(tmp_path: Path) -> None:
    model = chain(2)
    model.opset_import[0].version = 16
    for node in model.graph.node:
        if node.op_type == "LayerNormalization":
            node.op_type = "Softmax"
            del node.input[1]
    path = save_external(model, tmp_path / "old.onnx")
    with pytest.raises(InputError, match="version 16, and mixes need 17: export it anew"):
        plan_file(path, DEFAULT, {})


# external weights


def test_external_weights_in_the_same_directory_are_shared(tmp_path: Path) -> None:
    plain = save_external(chain(), tmp_path / "plain.onnx")
    before = (tmp_path / "weights.data").stat()
    converted, back = tmp_path / "converted.onnx", tmp_path / "back.onnx"
    convert_file(plain, converted, DEFAULT, {})
    assert verify_files(converted, plain).passed
    assert "SHA-256 recorded" in strip_file(converted, back)
    assert back.read_bytes() == plain.read_bytes()
    after = (tmp_path / "weights.data").stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_nlink) == (
        before.st_ino,
        before.st_mtime_ns,
        1,
    )


def test_external_weights_go_along_into_another_directory(tmp_path: Path) -> None:
    plain = save_external(chain(), tmp_path / "in" / "plain.onnx", "parts/weights.data")
    weights = np.arange(3 * 64, dtype=np.float32) / 100
    (tmp_path / "in/parts/weights.data").write_bytes(weights.tobytes())
    (tmp_path / "out").mkdir()
    converted = tmp_path / "out" / "converted.onnx"
    convert_file(plain, converted, DEFAULT, {})
    copied = tmp_path / "out/parts/weights.data"
    assert copied.read_bytes() == weights.tobytes()
    assert copied.stat().st_nlink == 1  # ONNX's loader refuses files of several names
    onnx.load(converted)
    assert verify_files(converted, plain).passed
    with pytest.raises(OutputExistsError, match=r"weights\.data exists already"):
        convert_file(plain, tmp_path / "out" / "other.onnx", DEFAULT, {})


def test_a_small_external_constant_is_read(tmp_path: Path) -> None:
    """The shape that a Reshape goes to may lie in the other file as well."""
    program = Program()
    x = program("Reshape", "x", program.ints(2, -1, 8))
    for _ in range(2):
        x = program("Add", x, program.f(program.norm(x)))
    model = program.model(x)
    target = model.graph.initializer[0]
    target.ClearField("raw_data")
    target.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "shape.bin"), ("offset", 8), ("length", 24)):
        target.external_data.add(key=key, value=str(value))
    path = save(model, tmp_path / "model.onnx")
    (tmp_path / "shape.bin").write_bytes(np.array([9, 2, -1, 8], np.int64).tobytes())
    assert plan_file(path, DEFAULT, {"x": (2, 3, 8)}).num_residual_additions == 2
    (tmp_path / "shape.bin").write_bytes(np.array([9, 2, -1, 7], np.int64).tobytes())
    with pytest.raises(InputError, match="do not fit"):
        plan_file(path, DEFAULT, {"x": (2, 3, 8)})


# Not by getrusage, which counts what the process was before it became this program.
CONVERT_AND_PRINT_MEMORY = """
import re, sys
from pathlib import Path
from attnres_compile.cli import main
code = main(sys.argv[1:])
print(re.search("VmHWM:.*", Path("/proc/self/status").read_text())[0])
sys.exit(code)
"""


@pytest.mark.slow
def test_three_gigabytes_in_less_than_one(tmp_path: Path) -> None:
    plain = save_external(chain(24, 6144, data=False), tmp_path / "in" / "plain.onnx")
    assert (tmp_path / "in/weights.data").stat().st_size > 3 << 30
    arguments = ["convert", str(plain), str(tmp_path / "in/out.onnx")]
    command = [sys.executable, "-c", CONVERT_AND_PRINT_MEMORY, *arguments]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    peak = int(found.stdout.split()[-2])
    assert 100_000 < peak < 1_000_000  # kilobytes
    assert read_record(tmp_path / "in/out.onnx") is not None


# the command line


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_command_line(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    converted, back = plain.with_name("c.onnx"), plain.with_name("b.onnx")
    code, out, _ = said(capsys, "plan", plain)
    assert code == 0
    assert "plain.onnx: 3 residual additions in 1 stream" in out
    assert said(capsys, "convert", plain, converted, "--num-blocks", "2")[0] == 0
    code, out, _ = said(capsys, "inspect", converted, "--json")
    shown = json.loads(out)
    assert (code, shown["format"], shown["new_parameters"]) == (0, ".onnx", 3 * 2 * 8)
    assert shown["streams"][0]["blocks"] == [1, 2]
    code, out, _ = said(capsys, "verify", converted, "--json")
    assert (code, json.loads(out)["passed"]) == (0, True)
    assert said(capsys, "verify", converted, plain, "--input-shape", "x=1,5,8")[0] == 0
    with_queries(converted, 1.0)
    assert said(capsys, "verify", converted, plain)[0] == 3
    code, out, _ = said(capsys, "inspect", converted, "--json")
    assert json.loads(out)["trained_sites"] == 3
    code, out, err = said(capsys, "strip", converted, back)
    assert (code, "3 queries were trained" in err) == (0, True)
    assert back.read_bytes() == plain.read_bytes()


def test_plain_files_are_inspected(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "inspect", plain)
    assert code == 0
    assert "tensors: 4" in out
    assert "No Attention Residuals." in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["convert", "plain.onnx", "out.pt"], "converts to a .onnx file"),
        (["convert", "plain.onnx", "out.onnx", "--names", "kimi"], "keeps the names"),
        (["convert", "plain.onnx", "out.onnx", "--copy"], "another directory"),
        (["plan", "plain.onnx", "--input-shape", "2,3,8"], "have names: say NAME=SHAPE"),
        (["plan", "plain.onnx", "--input-shape", "z=2,3,8"], "no input 'z'"),
        (["inspect", "plain.onnx", "--depth-attention", "-"], "run by ONNX Runtime"),
        (["strip", "plain.onnx", "out.onnx"], "nothing to strip"),
    ],
)
def test_misuse(
    words: list[str],
    sentence: str,
    plain: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(plain.parent)
    code, _, err = said(capsys, *words)
    assert code == 2
    assert sentence in err.splitlines()[-1]
    assert os.listdir() == ["plain.onnx"]


def test_files_do_not_load_into_pytorch(converted: Path) -> None:
    with pytest.raises(InputError, match="run by ONNX Runtime"):
        load(converted)


def test_the_missing_package_is_named(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from attnres_compile.checkpoint.converting import plan_source
    from attnres_compile.checkpoint.sources import Source

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'attnres-compile\[onnx\]'"):
        plan_source(Source(plain), DEFAULT)
