"""Every format there and back: convert, load, verify, train, save, load, strip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import attnres_compile
from attnres_compile import AttnResConfig
from attnres_compile.checkpoint.converting import Options, convert_source
from attnres_compile.checkpoint.sources import Source
from attnres_compile.checkpoint.stripping import strip_source
from checkpoint.models import (
    ALL,
    CUSTOM,
    GPT2,
    LLAMA,
    T5,
    TRANSFORMERS,
    VIT,
    Example,
    bytes_in,
    first_output,
    same_tensors,
    train,
)

CONFIG = AttnResConfig(num_blocks=2)
FILES = (".safetensors", ".pt", ".pth", ".bin")


def directory_of(example: Example, path: Path, dtype: torch.dtype, *, shards: bool) -> Path:
    example.build(dtype).save_pretrained(path, max_shard_size="10KB" if shards else "1GB")
    (path / "README.md").write_text("# A model\n")
    assert (path / "model.safetensors.index.json").exists() == shards
    return path


@pytest.mark.parametrize(
    ("example", "dtype", "shards"),
    [
        pytest.param(LLAMA, torch.bfloat16, True, marks=pytest.mark.slow),
        (VIT, torch.float32, False),
        pytest.param(LLAMA, torch.float32, False, marks=pytest.mark.slow),
        pytest.param(GPT2, torch.float32, True, marks=pytest.mark.slow),
        pytest.param(GPT2, torch.bfloat16, False, marks=pytest.mark.slow),
        pytest.param(T5, torch.float32, True, marks=pytest.mark.slow),
        pytest.param(T5, torch.bfloat16, False, marks=pytest.mark.slow),
        pytest.param(VIT, torch.bfloat16, True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_hugging_face_directory(
    example: Example, dtype: torch.dtype, shards: bool, tmp_path: Path
) -> None:
    source = directory_of(example, tmp_path / "source", dtype, shards=shards)
    before = bytes_in(source)
    inputs = example.call(dtype)

    convert_source(Source(source), tmp_path / "converted", CONFIG, Options())
    strip_source(Source(tmp_path / "converted"), tmp_path / "stripped", Options())
    assert bytes_in(tmp_path / "stripped") == before == bytes_in(source)

    model = attnres_compile.load(tmp_path / "converted")
    plain: Any = type(example.build()).from_pretrained(source)
    assert type(model).__mro__[2] is type(plain) or type(model) is type(plain)
    assert next(model.parameters()).dtype == dtype
    assert attnres_compile.verify(plain, model, (), inputs, float64=False).passed

    train(model, inputs, only_new=True)
    attnres_compile.save(model, tmp_path / "trained")
    again = attnres_compile.load(tmp_path / "trained")
    assert same_tensors(again, model)
    assert torch.equal(first_output(again.eval(), inputs), first_output(model.eval(), inputs))
    strip_source(Source(tmp_path / "trained"), tmp_path / "back", Options())
    assert same_tensors(type(plain).from_pretrained(tmp_path / "back"), plain)

    train(model, inputs)
    attnres_compile.save(model, tmp_path / "all")
    strip_source(Source(tmp_path / "all"), tmp_path / "trained_plain", Options())
    stripped = type(plain).from_pretrained(tmp_path / "trained_plain")
    assert not same_tensors(stripped, plain)
    trained = model.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in stripped.state_dict().items())


@pytest.mark.parametrize("suffix", FILES)
def test_single_files_of_a_custom_module(suffix: str, tmp_path: Path) -> None:
    check_file(CUSTOM, suffix, tmp_path, CUSTOM.build())


def test_a_state_dict_of_a_language_model(tmp_path: Path) -> None:
    (gpt2,) = (example for example in TRANSFORMERS if example.name == "gpt2")
    check_file(gpt2, ".pt", tmp_path, gpt2.build())


@pytest.mark.slow
@pytest.mark.parametrize("example", TRANSFORMERS, ids=lambda example: example.name)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_single_files_of_transformers(
    example: Example, suffix: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    check_file(example, suffix, tmp_path, example.build(dtype), dtype)


def check_file(
    example: Example, suffix: str, tmp_path: Path, model: Any, dtype: torch.dtype = torch.float32
) -> None:
    source, output = tmp_path / f"source{suffix}", tmp_path / f"converted{suffix}"
    write(model, source)
    before = source.read_bytes()
    inputs = example.call(dtype)
    call = ((), inputs)

    convert_source(Source(source, lambda: example.build(dtype), call), output, CONFIG, Options())
    back = tmp_path / f"back{suffix}"
    strip_source(Source(output), back, Options())
    assert source.read_bytes() == before
    if suffix == ".safetensors":
        assert back.read_bytes() == before
    else:
        assert_same_state(torch.load(back), torch.load(source))

    converted = attnres_compile.load(output, example.build(dtype))
    assert attnres_compile.verify(model, converted, (), inputs, float64=False).passed

    train(converted, inputs, only_new=True)
    trained = tmp_path / f"trained{suffix}"
    attnres_compile.save(converted, trained)
    again = attnres_compile.load(trained, example.build(dtype))
    assert same_tensors(again, converted)
    assert torch.equal(first_output(again, inputs), first_output(converted, inputs))
    strip_source(Source(trained), tmp_path / f"plain{suffix}", Options())
    plain = attnres_compile.checkpoint.sources.load_plain(
        Source(tmp_path / f"plain{suffix}", lambda: example.build(dtype))
    )
    assert same_tensors(plain, model)


def test_exported_program(tmp_path: Path) -> None:
    model, (x,) = CUSTOM.build(), tuple(CUSTOM.call().values())
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program, tmp_path / "source.pt2")

    convert_source(Source(tmp_path / "source.pt2"), tmp_path / "out.pt2", CONFIG, Options())
    converted = attnres_compile.load(tmp_path / "out.pt2")
    torch.testing.assert_close(converted(x), model(x), rtol=1e-6, atol=1e-6)
    report = attnres_compile.verify(program.module(), converted, (x,))
    assert report.passed

    strip_source(Source(tmp_path / "out.pt2"), tmp_path / "back.pt2", Options())
    restored = torch.export.load(tmp_path / "back.pt2")
    assert str(restored.graph) == str(torch.export.load(tmp_path / "source.pt2").graph)
    assert_same_state(restored.state_dict, program.state_dict)


def test_a_converted_model_saves_as_a_program(tmp_path: Path) -> None:
    converted = attnres_compile.convert(CUSTOM.build(), (), CUSTOM.call())
    train(converted, CUSTOM.call())
    x = CUSTOM.call()["x"]

    attnres_compile.save(converted, tmp_path / "model.pt2", args=(x,))
    loaded = attnres_compile.load(tmp_path / "model.pt2")

    torch.testing.assert_close(loaded(x), converted(x), rtol=1e-6, atol=1e-6)
    attention = attnres_compile.depth_attention(loaded, (x,))
    expected = attnres_compile.depth_attention(converted, (x,))
    assert attention.sources == expected.sources


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_new_parameters_only(suffix: str, tmp_path: Path) -> None:
    converted = attnres_compile.convert(LLAMA.build(), (), LLAMA.call(), config=CONFIG)
    train(converted, LLAMA.call(), only_new=True)
    path = tmp_path / f"new{suffix}"

    attnres_compile.save(converted, path, new_only=True)
    again = attnres_compile.load(path, LLAMA.build())

    assert path.stat().st_size < 25_000
    assert same_tensors(again, converted)
    assert torch.equal(first_output(again, LLAMA.call()), first_output(converted, LLAMA.call()))


def test_the_new_weights_of_a_directory_are_such_a_file(tmp_path: Path) -> None:
    source = directory_of(LLAMA, tmp_path / "source", torch.float32, shards=False)
    convert_source(Source(source), tmp_path / "out", CONFIG, Options())

    loaded = attnres_compile.load(tmp_path / "out" / "attnres.safetensors", LLAMA.build())

    assert same_tensors(loaded, attnres_compile.load(tmp_path / "out"))


def test_what_save_pretrained_writes_loads_and_strips(tmp_path: Path) -> None:
    converted = attnres_compile.convert(LLAMA.build(), (), LLAMA.call(), config=CONFIG)
    train(converted, LLAMA.call())
    converted.save_pretrained(tmp_path / "saved", max_shard_size="20KB")

    again = attnres_compile.load(tmp_path / "saved")
    assert same_tensors(again, converted)
    assert again.plan.config == CONFIG

    strip_source(Source(tmp_path / "saved"), tmp_path / "plain", Options())
    plain = type(LLAMA.build()).from_pretrained(tmp_path / "plain")
    assert same_tensors(plain, attnres_compile.checkpoint.saving.plain_model(converted))


def test_bin_shards_are_linked_and_never_opened(tmp_path: Path) -> None:
    source = tmp_path / "source"
    model = LLAMA.build()
    model.save_pretrained(source)
    state = model.state_dict()
    (source / "model.safetensors").unlink()
    torch.save(state, source / "pytorch_model.bin")

    convert_source(Source(source), tmp_path / "out", CONFIG, Options())

    assert (tmp_path / "out" / "pytorch_model.bin").samefile(source / "pytorch_model.bin")
    loaded = attnres_compile.load(tmp_path / "out")
    assert torch.equal(
        loaded.get_parameter("model.norm.weight"), model.get_parameter("model.norm.weight")
    )


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    converted = attnres_compile.convert(LLAMA.build(), (), LLAMA.call())
    attnres_compile.save(converted, tmp_path / "x.safetensors")
    attnres_compile.save(converted, tmp_path / "x")

    for loaded in (
        attnres_compile.load(tmp_path / "x"),
        attnres_compile.load(tmp_path / "x.safetensors", LLAMA.build()),
    ):
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_state_dict_inside_a_training_checkpoint(tmp_path: Path) -> None:
    model = CUSTOM.build()
    torch.save({"model": model.state_dict(), "step": 7}, tmp_path / "run.pt")
    source = Source(tmp_path / "run.pt", CUSTOM.build, ((), CUSTOM.call()))

    convert_source(source, tmp_path / "out.pt", CONFIG, Options())
    assert torch.load(tmp_path / "out.pt")["step"] == 7
    strip_source(Source(tmp_path / "out.pt"), tmp_path / "back.pt", Options())

    back = torch.load(tmp_path / "back.pt")
    assert back["step"] == 7
    assert set(back) == {"model", "step"}
    assert_same_state(back["model"], model.state_dict())


@pytest.mark.parametrize("example", ALL, ids=lambda example: example.name)
def test_examples_are_distinct(example: Example) -> None:
    assert sum(p.numel() for p in example.build().parameters()) > 300


def write(model: Any, path: Path) -> None:
    if path.suffix != ".safetensors":
        torch.save(model.state_dict(), path)
        return
    from safetensors.torch import save_model

    save_model(model, path)


def assert_same_state(first: Any, second: Any) -> None:
    assert list(first) == list(second)
    for name in first:
        assert torch.equal(first[name], second[name]), name
        assert first[name].dtype == second[name].dtype
