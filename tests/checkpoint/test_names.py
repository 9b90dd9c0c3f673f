"""Names and units of Kimi K3 and flash-linear-attention, both ways, bit for bit."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import attnres_compile
from attnres_compile import AttnResConfig
from attnres_compile.checkpoint import names as naming
from attnres_compile.checkpoint.converting import Options, convert_source
from attnres_compile.checkpoint.names import block_size, detect
from attnres_compile.checkpoint.sources import Source
from attnres_compile.checkpoint.stripping import strip_source
from attnres_compile.errors import CheckpointError, ConfigError
from checkpoint.models import LLAMA, T5, first_output, same_tensors
from conversions import randomize

MEAN = AttnResConfig(aggregate="mean", block_sublayers=4, eps=1e-6)
KIMI = {
    "self_attention_res_proj.weight": (1, 32),
    "self_attention_res_norm.weight": (32,),
    "mlp_res_proj.weight": (1, 32),
    "mlp_res_norm.weight": (32,),
}
FLA = {name.replace("self_attention_res", "attn_res"): shape for name, shape in KIMI.items()}


@pytest.fixture(scope="module")
def converted() -> Any:
    model = attnres_compile.convert(LLAMA.build(), (), LLAMA.call(), config=MEAN)
    randomize(model)
    return model


@pytest.mark.parametrize(
    ("names", "per_layer", "output"),
    [("kimi", KIMI, "model.output_attn_res"), ("fla", FLA, "model.res")],
)
def test_written_names_and_shapes(
    names: Any, per_layer: dict[str, tuple[int, ...]], output: str, converted: Any, tmp_path: Path
) -> None:
    attnres_compile.save(converted, tmp_path / "new.safetensors", names=names, new_only=True)
    expected = {f"model.layers.{i}.{n}": shape for i in range(4) for n, shape in per_layer.items()}
    expected |= {f"{output}_proj.weight": (1, 32), f"{output}_norm.weight": (32,)}

    written = load_file(tmp_path / "new.safetensors")

    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == expected
    query = converted.model.attnres.before_layers_1_post_attention_layernorm.query
    assert torch.equal(written["model.layers.1.mlp_res_proj.weight"], query.reshape(1, -1))
    gain = converted.model.attnres.before_norm.gain
    assert torch.equal(written[f"{output}_norm.weight"], gain)
    first = next(name for name in per_layer if "proj" in name and "mlp" not in name)
    assert not written[f"model.layers.0.{first}"].any()


@pytest.mark.parametrize("names", ["kimi", pytest.param("fla", marks=pytest.mark.slow)])
def test_round_trip_is_bitwise(names: Any, converted: Any, tmp_path: Path) -> None:
    attnres_compile.save(converted, tmp_path / "theirs", names=names)
    loaded = attnres_compile.load(tmp_path / "theirs")
    attnres_compile.save(loaded, tmp_path / "again", names=names)

    assert same_tensors(loaded, converted)
    assert torch.equal(first_output(loaded, LLAMA.call()), first_output(converted, LLAMA.call()))
    first, second = (load_file(tmp_path / n / "attnres.safetensors") for n in ("theirs", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("names", "key", "size"),
    [
        ("kimi", "attn_res_block_size", 2),
        ("fla", "attnres_block_size", 4),
    ],
)
def test_units_in_the_config(
    names: Any, key: str, size: int, converted: Any, tmp_path: Path
) -> None:
    attnres_compile.save(converted, tmp_path / "x", names=names)
    assert json.loads((tmp_path / "x" / "config.json").read_text())[key] == size
    assert block_size(converted.plan, names) == size


def foreign(converted: Any, path: Path, names: Any, prefix: str) -> dict[str, torch.Tensor]:
    """A file as another project would write it: no record, and something in the unused pair."""
    attnres_compile.save(converted, path, names=names, new_only=True)
    tensors = {f"{prefix}{name}": tensor for name, tensor in load_file(path).items()}
    first = naming.NAMINGS[names].attention
    tensors[f"{prefix}model.layers.0.{first}_proj.weight"] = torch.randn(1, 32)
    tensors[f"{prefix}model.layers.0.{first}_norm.weight"] = torch.randn(32)
    path.unlink()
    save_file(tensors, path)
    return tensors


@pytest.mark.parametrize("names", ["kimi", "fla"])
@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_files_of_others_are_read_and_nothing_of_them_is_lost(
    names: Any, prefix: str, converted: Any, tmp_path: Path
) -> None:
    theirs = foreign(converted, tmp_path / "theirs.safetensors", names, prefix)

    loaded = attnres_compile.load(tmp_path / "theirs.safetensors", LLAMA.build(), config=MEAN)
    assert same_tensors(loaded, converted)

    attnres_compile.save(loaded, tmp_path / "native.safetensors")
    kept = attnres_compile.load(tmp_path / "native.safetensors", LLAMA.build())
    attnres_compile.save(kept, tmp_path / "back.safetensors", names=names, new_only=True)
    back = load_file(tmp_path / "back.safetensors")
    assert {n.removeprefix(prefix) for n in theirs} == set(back)
    assert all(torch.equal(theirs[prefix + name], tensor) for name, tensor in back.items())


def test_files_of_others_need_the_size_of_a_block(converted: Any, tmp_path: Path) -> None:
    foreign(converted, tmp_path / "theirs.safetensors", "kimi", "")
    with pytest.raises(ConfigError, match="does not say how long its blocks are"):
        attnres_compile.load(tmp_path / "theirs.safetensors", LLAMA.build())


@pytest.mark.slow
def test_translation_in_the_shell(converted: Any, tmp_path: Path) -> None:
    attnres_compile.save(converted, tmp_path / "native")
    for source, target, names in [
        ("native", "k3", "kimi"),
        ("k3", "f", "fla"),
        ("f", "n", "native"),
    ]:
        convert_source(
            Source(tmp_path / source), tmp_path / target, AttnResConfig(), Options(names=names)
        )
    assert same_tensors(attnres_compile.load(tmp_path / "n"), converted)
    strip_source(Source(tmp_path / "k3"), tmp_path / "plain", Options())
    assert same_tensors(type(LLAMA.build()).from_pretrained(tmp_path / "plain"), LLAMA.build())


@pytest.mark.parametrize(
    ("lengths", "options", "names", "sentence"),
    [
        ((4, 4), {"aggregate": "sum"}, "kimi", 'convert with aggregate="mean"'),
        ((4, 4), {"aggregate": "sum"}, "fla", 'convert with aggregate="mean"'),
        ((3, 3, 2), {}, "kimi", "block_sublayers=4"),
        ((2, 2, 4), {}, "fla", "needs blocks of one size"),
        ((4, 4), {"key_gain": False}, "kimi", "key_gain=True"),
    ],
)
def test_what_they_cannot_express_is_refused(
    lengths: tuple[int, ...],
    options: dict[str, Any],
    names: Any,
    sentence: str,
    converted: Any,
    tmp_path: Path,
) -> None:
    plan = relaid(converted.plan, lengths, options)
    model = copy.copy(converted)
    model.__dict__["plan"] = plan
    with pytest.raises(ConfigError) as caught:
        attnres_compile.save(model, tmp_path / "x.safetensors", names=names)
    assert sentence in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def relaid(plan: Any, lengths: tuple[int, ...], options: dict[str, Any]) -> Any:
    """The same plan in other blocks and with other options."""
    (stream,) = plan.streams
    rest = iter(stream.sublayers)
    blocks = tuple(tuple(itertools.islice(rest, length)) for length in lengths)
    config = dataclasses.replace(plan.config, **options)
    stream = dataclasses.replace(stream, blocks=blocks)
    return dataclasses.replace(plan, streams=(stream,), config=config)


@pytest.mark.parametrize(
    ("lengths", "size"), [((4, 4), 4), ((3, 3, 2), 3), ((1,) * 8, 1), ((8,), 8)]
)
def test_sublayers_per_block(lengths: tuple[int, ...], size: int, converted: Any) -> None:
    assert block_size(relaid(converted.plan, lengths, {}), "fla") == size


@pytest.mark.slow
def test_two_streams_are_refused(tmp_path: Path) -> None:
    model = attnres_compile.convert(
        T5.build(), (), T5.call(), config=AttnResConfig(aggregate="mean")
    )
    with pytest.raises(ConfigError, match="one residual stream"):
        attnres_compile.save(model, tmp_path / "x", names="kimi")


def test_a_query_of_another_shape_is_named(converted: Any, tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    theirs = foreign(converted, path, "kimi", "")
    name = "model.layers.2.mlp_res_proj.weight"
    save_file({**theirs, name: torch.zeros(32, 1)}, path)
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp_res_proj\.weight should be one row"):
        attnres_compile.load(path, LLAMA.build(), config=MEAN)


def test_detection() -> None:
    assert detect({"a.layers.3.self_attention_res_proj.weight": 0}) == "kimi"
    assert detect({"model.layers.3.attn_res_norm.weight": 0}) == "fla"
    assert detect({"model.layers.3.self_attn.q_proj.weight": 0}) is None
    assert detect({"layers.3.mlp_res_proj.weight": 0}) is None
