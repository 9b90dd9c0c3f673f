"""``save(converted, "model.onnx")``: trained conversions, exported with the same functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import attnres_compile
from attnres_compile import AttnResConfig, onnx_export
from attnres_compile.checkpoint.onnx import read_record, strip_file
from attnres_compile.cli import main
from attnres_compile.errors import CaptureError, ConfigError, InputError, OutputExistsError
from conversions import (
    NUM_BLOCKS,
    convert_randomized,
    converted_llama,
    converted_tower,
    llama_inputs,
    tower,
    tower_inputs,
)
from tolerances import relative_error


def run(path: Path, *inputs: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    feeds = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    outputs: Any = session.run(None, feeds)
    return torch.from_numpy(np.array(outputs[0]))


@pytest.fixture(scope="module")
def tower_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    path = tmp_path_factory.mktemp("export") / "tower.onnx"
    converted = converted_tower()
    attnres_compile.save(converted, path, args=(tower_inputs(),))
    return converted, path


def test_exported_file_computes_what_the_model_does(tower_file: tuple[Any, Path]) -> None:
    converted, path = tower_file
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path)
    calls = [node.op_type for node in model.graph.node if node.domain == "attnres"]
    assert calls == ["Mix2", "Mix2", "Mix3", "Mix3"]  # four layers in two blocks
    assert [f.name for f in model.functions] == ["Mix2", "Mix3"]
    names = {t.name for t in model.graph.initializer}
    assert {n for n, _ in converted.named_parameters()} <= names
    for batch in (6, 3):
        x = tower_inputs(batch)
        with torch.no_grad():
            expected, plain = converted(x), tower()(x)
        assert relative_error(run(path, x), expected) <= 1e-5
        assert relative_error(run(path, x), plain) > 1e-3


def test_record(tower_file: tuple[Any, Path], capsys: pytest.CaptureFixture[str]) -> None:
    converted, path = tower_file
    record = read_record(path)
    assert record is not None
    assert record.plan.streams == converted.plan.streams
    assert main(["inspect", str(path)]) == 0
    assert "4 of them trained" in capsys.readouterr().out
    with pytest.raises(InputError, match="does not hold the plain one"):
        strip_file(path, path.with_name("plain.onnx"))


def test_options_that_a_file_cannot_have(tower_file: tuple[Any, Path]) -> None:
    converted, path = tower_file
    with pytest.raises(ConfigError, match="names"):
        attnres_compile.save(converted, path, names="kimi")
    with pytest.raises(ConfigError, match="saved whole and with native names"):
        attnres_compile.save(converted, path, new_only=True)
    with pytest.raises(OutputExistsError, match="exists already"):
        attnres_compile.save(converted, path, args=(tower_inputs(),))


class Images(nn.Module):
    """Convolutions, whose channel is dimension 1."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return x


@pytest.mark.slow
def test_images_of_another_size_without_gain(tmp_path: Path) -> None:
    config = AttnResConfig(num_blocks=2, key_gain=False, aggregate="mean", eps=0.1)
    x = torch.randn(2, 8, 6, 5)
    converted = convert_randomized(Images().eval(), (x,), config=config)
    path = tmp_path / "images.onnx"
    attnres_compile.save(converted, path, args=(x,))
    onnx.checker.check_model(str(path), full_check=True)
    larger = torch.randn(3, 8, 9, 4)
    with torch.no_grad():
        expected = converted(larger)
    assert relative_error(run(path, larger), expected) <= 1e-5


@pytest.mark.slow
def test_llama_with_dynamic_batch_and_sequence(tmp_path: Path) -> None:
    converted = converted_llama().eval()
    assert converted.plan.config.num_blocks == NUM_BLOCKS
    converted.config.use_cache = False
    kwargs = llama_inputs()
    path = tmp_path / "llama.onnx"
    attnres_compile.save(converted, path, kwargs=kwargs)
    onnx.checker.check_model(str(path), full_check=True)
    for batch, length in ((2, 7), (3, 11), (1, 4)):
        ids = torch.randint(4, 30, (batch, length))
        mask = torch.ones_like(ids)
        with torch.no_grad():
            expected = converted(input_ids=ids, attention_mask=mask).logits
        assert relative_error(run(path, ids, mask), expected) <= 1e-4


def test_large_weights_go_into_a_file_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "_LARGEST_INLINE", 100)
    converted, path = converted_tower(), tmp_path / "tower.onnx"
    attnres_compile.save(converted, path, args=(tower_inputs(),))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["tower.onnx", "tower.onnx.data"]
    with torch.no_grad():
        expected = converted(tower_inputs())
    assert relative_error(run(path, tower_inputs()), expected) <= 1e-5
    path.unlink()
    with pytest.raises(OutputExistsError, match=r"tower\.onnx\.data exists already"):
        attnres_compile.save(converted, path, args=(tower_inputs(),))


class Untranslatable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(torch.special.bessel_j0(x))
        return x


def test_what_torch_cannot_translate(tmp_path: Path) -> None:
    x = torch.randn(2, 8)
    converted = attnres_compile.convert(Untranslatable().eval(), (x,))
    with pytest.raises(CaptureError, match="Untranslatable was exported by torch") as caught:
        attnres_compile.save(converted, tmp_path / "model.onnx", args=(x,))
    assert "bessel_j0" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
