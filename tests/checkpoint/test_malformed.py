"""Damaged, foreign and hostile files: one sentence, exit code 1 or 2, and no code is run."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from attnres_compile.checkpoint import pt
from attnres_compile.checkpoint.pt2_safety import is_harmless
from attnres_compile.checkpoint.safetensors import read_header
from attnres_compile.cli import main
from checkpoint.damages import Damage, copied, cut, memory_of, refused, write_good
from checkpoint.models import CUSTOM

pytestmark = pytest.mark.timeout(120)  # none hangs

MODEL = ["--model", "conversions:tower", "--input-shape", "6,5"]


class Payload:
    """A pickle of this makes a file when it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("good")
    write_good(home)
    return home


def header(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Rewrites the header of a safetensors file."""

    def damage(path: Path) -> None:
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        data = json.loads(raw[8 : 8 + length])
        text = change(data)
        new = text if isinstance(text, bytes) else json.dumps(data).encode()
        path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])

    return damage


def entry(**values: Any) -> Damage:
    """Changes the header's entry of one tensor."""
    return header(lambda data: data["head.bias"].update(values))


def record(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Changes the record of the conversion."""

    def in_header(data: dict[str, Any]) -> None:
        layout = json.loads(data["__metadata__"]["attnres_compile"])
        change(layout)
        data["__metadata__"]["attnres_compile"] = json.dumps(layout)

    return header(in_header)


def content(raw: bytes) -> Damage:
    return lambda path: path.write_bytes(raw)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    """Changes tensors, with a header that is right."""

    def damage(path: Path) -> None:
        from safetensors import safe_open
        from safetensors.torch import save_file

        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        change(held)
        path.unlink()
        save_file(held, path, metadata)

    return damage


QUERY = "attnres.before_layers_1_norm.query"
HUGE = 1 << 60
SAFETENSORS: dict[str, Damage] = {
    "empty": content(b""),
    "three bytes": content(b"abc"),
    "no safetensors": content(b"GIF89a" + bytes(range(200))),
    "header longer than the file": content(struct.pack("<Q", HUGE) + b"{}"),
    "header cut off": cut(60),
    "data cut off": lambda path: path.write_bytes(path.read_bytes()[:-4]),
    "data too long": lambda path: path.write_bytes(path.read_bytes() + b"\0" * 8),
    "header is a list": header(lambda data: b"[1, 2]"),
    "header is no JSON": header(lambda data: b'{"a": '),
    "header is no text": header(lambda data: b"\xff\xfe\xff"),
    "header nested without end": header(lambda data: b"[" * 100_000),
    "entry is a number": header(lambda data: data.__setitem__("head.bias", 3)),
    "entry without dtype": header(lambda data: data["head.bias"].pop("dtype")),
    "unknown dtype": entry(dtype="F7"),
    "negative shape": entry(shape=[-3]),
    "shape of text": entry(shape=["three"]),
    "shape too large": entry(shape=[HUGE, HUGE]),
    "offsets reversed": header(lambda d: d["head.bias"]["data_offsets"].reverse()),
    "offsets far away": entry(data_offsets=[HUGE, HUGE + 12]),
    "offsets overlap": header(
        lambda d: d["head.bias"].update(data_offsets=d["norm.bias"]["data_offsets"], shape=[8])
    ),
    "three offsets": entry(data_offsets=[0, 4, 8]),
    "boolean size": entry(shape=[True, 3]),
    "metadata of numbers": header(lambda data: data["__metadata__"].update(x=3)),
    "no record": header(lambda data: data["__metadata__"].pop("attnres_compile")),
    "record is no JSON": header(lambda d: d["__metadata__"].update(attnres_compile="{")),
    "record of a later version": record(lambda r: r.update(version=9)),
    "record without a plan": record(lambda r: r.pop("plan")),
    "unknown option": record(lambda r: r["plan"]["config"].update(flavour="mint")),
    "option out of range": record(lambda r: r["plan"]["config"].update(eps=-1)),
    "site left out by nobody": record(
        lambda r: r["plan"]["streams"][0]["sites"][0].update(left_out_by="me")
    ),
    "unknown names": record(lambda r: r.update(names="theirs")),
    "stream of huge width": record(lambda r: r["plan"]["streams"][0].update(width=HUGE)),
    "stream of another owner": record(lambda r: r["plan"]["streams"][0].update(owner="nowhere")),
    "sites that are missing": record(lambda r: r["plan"]["streams"][0]["sites"].pop()),
    "depth of text": record(lambda r: r["plan"]["streams"][0]["sites"][0].update(depth="deep")),
    "NaN query": tensors(lambda t: t[QUERY].fill_(torch.nan)),
    "infinite query": tensors(lambda t: t[QUERY].fill_(torch.inf)),
    "query of another dtype": tensors(lambda t: t.update({QUERY: t[QUERY].to(torch.int8)})),
    "query of another width": tensors(lambda t: t.update({QUERY: torch.zeros(4)})),
    "query that is missing": tensors(lambda t: t.pop(QUERY)),
    "query too many": tensors(lambda t: t.update({"attnres.more.query": torch.zeros(8)})),
    "weight of another shape": tensors(lambda t: t.update({"head.bias": torch.zeros(7)})),
    "weight of another dtype": tensors(lambda t: t.update({"head.bias": torch.zeros(3).int()})),
    "weight that is missing": tensors(lambda t: t.pop("head.bias")),
    "weights of another model": tensors(lambda t: t.update({"stranger": torch.zeros(3)})),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors(
    name: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied(good / "model.safetensors", tmp_path / "model.safetensors")
    SAFETENSORS[name](path)
    refused(capsys, path, "verify", str(path), *MODEL, "--no-float64")


@pytest.mark.parametrize("name", [*SAFETENSORS, "a header of nothing"])
def test_no_header_takes_more_than_twice_the_file(name: str, good: Path, tmp_path: Path) -> None:
    path = copied(good / "model.safetensors", tmp_path / "model.safetensors")
    nothing = struct.pack("<Q", 9_000_000) + b" " * 9_000_000
    SAFETENSORS.get(name, content(nothing))(path)
    assert memory_of(lambda: read_header(path)) < 2 * path.stat().st_size + 100_000


def test_the_good_file_passes(good: Path) -> None:
    assert main(["verify", str(good / "model.safetensors"), *MODEL, "--no-float64", "-q"]) == 0


def zipped(names: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Damage:
    def damage(path: Path) -> None:
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, raw in names.items():
                archive.writestr(name, raw)

    return damage


def with_payload(path: Path) -> None:
    torch.save({"state_dict": {}, "x": Payload(path.parent / "ran")}, path)


def plain_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Payload(path.parent / "ran")))


def old_pickle(path: Path) -> None:
    payload = {"x": Payload(path.parent / "ran")}
    torch.save(payload, path, _use_new_zipfile_serialization=False)


def expanded(path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, path)


def endless(path: Path) -> None:
    loop: list[Any] = []
    loop.append(loop)
    torch.save({"a": loop}, path)


PT: dict[str, Damage] = {
    "empty": content(b""),
    "text": content(b"hello, world, I am no checkpoint"),
    "cut off": cut(900),
    "a payload": with_payload,
    "a plain pickle": plain_pickle,
    "an old pickle": old_pickle,
    "another archive": zipped({"a/b.txt": b"x"}),
    "a compressed archive": zipped({"a/data.pkl": b"\0" * 100_000}, zipfile.ZIP_DEFLATED),
    "a whole module": lambda path: torch.save(CUSTOM.build(), path),
    "a list": lambda path: torch.save([1, 2], path),
    "no tensors": lambda path: torch.save({"step": 3}, path),
    "a list in itself": endless,
    "a tensor larger than the file": expanded,
    "another model": lambda path: torch.save({"other": torch.zeros(3)}, path),
    "another shape": lambda path: torch.save(
        {**CUSTOM.build().state_dict(), "head.bias": torch.zeros(9)}, path
    ),
    "a missing tensor": lambda path: torch.save(
        {k: v for k, v in CUSTOM.build().state_dict().items() if k != "head.bias"}, path
    ),
}


@pytest.mark.parametrize("name", PT)
def test_no_pickle_takes_more_than_twice_the_file(name: str, good: Path, tmp_path: Path) -> None:
    path = copied(good / "plain.pt", tmp_path / "plain.pt")
    PT[name](path)
    assert memory_of(lambda: pt.read_file(path)) < 2 * path.stat().st_size + 500_000


@pytest.mark.parametrize("name", PT)
def test_pt(name: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copied(good / "plain.pt", tmp_path / "plain.pt")
    PT[name](path)
    refused(capsys, path, "convert", str(path), str(tmp_path / "out.pt"), *MODEL)
    assert not (tmp_path / "out.pt").exists()


def pt2_json(change: Callable[[dict[str, Any]], Any], member: str = "models/model.json") -> Damage:
    """Changes a JSON member of an archive."""

    def damage(path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            held = {name: archive.read(name) for name in archive.namelist()}
        (name,) = [each for each in held if each.endswith(member)]
        data = json.loads(held[name])
        change(data)
        zipped({**held, name: json.dumps(data).encode()})(path)

    return damage


def pt2_inputs(path: Path) -> None:
    import io

    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    (name,) = [each for each in held if "sample_inputs" in each]
    buffer = io.BytesIO()
    torch.save(Payload(path.parent / "ran"), buffer)
    zipped({**held, name: buffer.getvalue()})(path)


def spec_that_imports(data: dict[str, Any]) -> None:
    signature = data["graph_module"]["module_call_graph"][0]["signature"]
    escaped = r'{"default\u005ffactory_module": "antigravity"}'
    signature["in_spec"] = json.dumps([1, {"context": escaped}])


PT2: dict[str, Damage] = {
    "empty": content(b""),
    "cut off": cut(3000),
    "no program": zipped({"a/b": b"x"}),
    "program is no JSON": lambda path: zipped({"a/models/model.json": b"{"})(path),
    "an operator that is none": pt2_json(
        lambda d: d["graph_module"]["graph"]["nodes"][0].update(target="torch.hub.load")
    ),
    "an operator that opens files": pt2_json(
        lambda d: d["graph_module"]["graph"]["nodes"][0].update(target="torch.ops.aten.from_file")
    ),
    "a guard that is code": pt2_json(
        lambda d: d.update(guards_code=["__import__('pathlib').Path('ran').touch()"])
    ),
    "an import in the input structure": pt2_json(spec_that_imports),
    "a pickled weight": pt2_json(
        lambda d: next(iter(d["config"].values())).update(use_pickle=True),
        "model_weights_config.json",
    ),
    "a payload in the example inputs": pt2_inputs,
}


@pytest.mark.parametrize("name", PT2)
def test_pt2(name: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copied(good / "plain.pt2", tmp_path / "plain.pt2")
    PT2[name](path)
    refused(capsys, path, "convert", str(path), str(tmp_path / "out.pt2"))


@pytest.mark.parametrize(
    ("expression", "harmless"),
    [
        ("Symbol('s77', positive=True, integer=True)", True),
        ("Max(1, s0 // 2) + 3", True),
        ("L['x'].size()[0] >= 2", True),
        ("__import__('os').system('ls')", False),
        ("().__class__", False),
        ("sympify('1')", False),
        ("s0.__class__", False),
        ("9**9**9**9", False),
        ("open('x')", False),
        ("lambda: 1", False),
        ("[x for x in s0]", False),
        ("1" * 20_000, False),
        ("(" * 500, False),
    ],
)
def test_expressions_of_a_program(expression: str, harmless: bool) -> None:
    assert is_harmless(expression) is harmless
