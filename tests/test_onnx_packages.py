"""Trained ONNX models of other people, from the packages that ship them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from attnres_compile import AttnResConfig
from attnres_compile.checkpoint.onnx import convert_file, plan_file, strip_file
from attnres_compile.errors import NothingToConvertError
from attnres_compile.onnx_verification import verify_files

OCR, MAGIKA, SILERO = "rapidocr_onnxruntime", "magika", "silero_vad"


def find(package: str, path: str) -> Path:
    if package == OCR and sys.version_info >= (3, 13):
        pytest.skip("rapidocr-onnxruntime is not there for this Python")
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is not installed; it is in the extra 'test'"
    assert spec.origin is not None
    return Path(spec.origin).parent / path


@pytest.mark.parametrize(
    ("file", "shape", "additions", "channel_dim"),
    [
        # SVTR: two transformer layers after a convolutional stem; a linear layer reads last
        ("models/ch_PP-OCRv4_rec_infer.onnx", (2, 3, 48, 64), [4], -1),
        # MobileNetV3: stages of equal width; the residual additions have no activation after them
        ("models/ch_ppocr_mobile_v2.0_cls_infer.onnx", (2, 3, 48, 192), [4, 2], 1),
    ],
)
def test_converted(
    file: str, shape: tuple[int, ...], additions: list[int], channel_dim: int, tmp_path: Path
) -> None:
    plain, converted = find(OCR, file), tmp_path / "converted.onnx"
    plan = convert_file(plain, converted, AttnResConfig(), {"x": shape})
    assert [len(stream.additions) for stream in plan.streams] == additions
    assert {stream.channel_dim for stream in plan.streams} == {channel_dim}
    onnx.checker.check_model(str(converted), full_check=True)
    assert verify_files(converted, plain).passed
    strip_file(converted, tmp_path / "back.onnx")
    assert onnx.load(tmp_path / "back.onnx") == onnx.load(plain)

    model = onnx.load(converted)
    for tensor in model.graph.initializer:
        if tensor.name.endswith(".query"):
            value = np.random.default_rng(0).standard_normal(tensor.dims[0]).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    converted.write_bytes(model.SerializeToString())
    report = verify_files(converted, plain)
    assert all(1e-3 < each.relative < np.inf for each in report.comparisons)


@pytest.mark.parametrize(
    ("package", "file", "reason"),
    [
        # a feature pyramid: what is added once per level has nothing to choose from
        (OCR, "models/ch_PP-OCRv4_det_infer.onnx", "a stream of one sublayer"),
        # dense layers and norms without a skip
        (MAGIKA, "models/standard_v3_3/model.onnx", "it has no residual addition"),
        # convolutions, one LSTM; inside the bodies of If in the first
        (SILERO, "data/silero_vad.onnx", "it has no residual addition"),
        (SILERO, "data/silero_vad_16k_op15.onnx", "it has no residual addition"),
        (SILERO, "data/silero_vad_half.onnx", "it has no residual addition"),
        (SILERO, "data/silero_vad_op18_ifless.onnx", "it has no residual addition"),
    ],
)
def test_refused(package: str, file: str, reason: str, tmp_path: Path) -> None:
    plain = find(package, file)
    assert plain.exists(), f"this version of {package} has no {file}"
    plan = plan_file(plain, AttnResConfig(), {})
    assert plan.streams == ()
    with pytest.raises(NothingToConvertError, match=reason):
        convert_file(plain, tmp_path / "out.onnx", AttnResConfig(), {})
    assert list(tmp_path.iterdir()) == []
