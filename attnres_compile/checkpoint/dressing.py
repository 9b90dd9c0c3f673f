"""Turn a directory with a plain model into one with a converted model, and back.

Only small files are written: the new parameters, and config, index and model card, whose originals
are kept under ``attnres_original/`` with the hashes of all files.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from attnres_compile.checkpoint import names as naming
from attnres_compile.checkpoint.huggingface import (
    CONFIG,
    NEW_WEIGHTS,
    ORIGINALS,
    Directory,
    check_link,
    checked_file,
    dump_json,
    open_directory,
    read_json_file,
)
from attnres_compile.checkpoint.record import KEY, Record, as_toml
from attnres_compile.checkpoint.safetensors import write_tensors
from attnres_compile.checkpoint.writing import Advance, ignore, link_or_copy, sha256
from attnres_compile.errors import CheckpointError, UnsafeFileError
from attnres_compile.huggingface import ENTRY, config_entry, marked

MANIFEST = "manifest.json"
CARD = "README.md"
OPTIONS = "attnres.toml"
_SECTION = re.compile(r"\n*<!-- attnres-compile:start -->.*<!-- attnres-compile:end -->\n", re.S)
_HIDDEN = (".git", ".cache", ".DS_Store")
_HASHERS = 2


@dataclass(frozen=True)
class Manifest:
    """The files of the original directory.

    Attributes:
        sizes: bytes by name.
        hashes: SHA-256 by name; None where hashing was put off.
        replaced: names whose original stands under ``attnres_original/``.
    """

    sizes: dict[str, int]
    hashes: dict[str, str | None]
    replaced: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        files = {n: {"size": self.sizes[n], "sha256": self.hashes[n]} for n in self.sizes}
        return {"files": files, "replaced": list(self.replaced)}


def files_in(directory: Path) -> list[str]:
    """Names of all files below a directory, as posix paths; links that lead out are refused.

    Raises:
        UnsafeFileError: a link leads out of the directory.
    """
    return sorted(_walk(directory, directory))


def copy_files(
    source: Path, target: Path, names: list[str], *, copy: bool, advance: Advance = ignore
) -> None:
    """Links (weights) or copies (everything else) files into a new directory."""
    for name in names:
        link_or_copy(source / name, target / name, copy=copy, advance=advance)


def dress(
    directory: Path,
    plain: Directory,
    record: Record,
    tensors: Mapping[str, Tensor],
    *,
    hashed: bool = True,
    advance: Advance = ignore,
) -> None:
    """Adds new parameters to a directory with a plain model.

    Args:
        directory: an unfinished output, which holds the files of the plain model already.
        plain: what the plain model's directory holds.
        record: the layout.
        tensors: the new parameters, under the names that the file should have.
        hashed: False to put off the hashing, which takes the time of reading everything.
        advance: is told the bytes that were hashed.
    """
    names = files_in(directory)
    index = plain.index or _index_for(plain)
    changed = {index, CARD} | ({CONFIG} if plain.config is not None else set())
    replaced = tuple(sorted(changed & set(names)))
    sizes = {name: (directory / name).stat().st_size for name in names}
    hashes = _hashes(directory, names, advance) if hashed else dict.fromkeys(names)
    (directory / ORIGINALS).mkdir()
    for name in replaced:
        shutil.move(directory / name, directory / ORIGINALS / name)
    manifest = Manifest(sizes, hashes, replaced)
    (directory / ORIGINALS / MANIFEST).write_text(dump_json(manifest.to_json()))
    write_tensors(directory / NEW_WEIGHTS, tensors, {KEY: record.encode()})
    (directory / OPTIONS).write_text(as_toml(record.plan.config))
    _write_index(directory, plain, index, tensors)
    _write_card(directory, record)
    if plain.config is not None:  # last: without it nothing loads
        saved = {**marked(plain.config), **naming.config_keys(record)}
        (directory / CONFIG).write_text(dump_json({**saved, ENTRY: config_entry(record)}))


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a converted directory; None for one that was saved without.

    Raises:
        CheckpointError: it is damaged.
        UnsafeFileError: it names files outside of the directory.
    """
    path = directory / ORIGINALS / MANIFEST
    if not path.exists():
        return None
    what = f"{directory.name}/{ORIGINALS}/{MANIFEST}"
    data = read_json_file(checked_file(directory / ORIGINALS, MANIFEST), what)
    try:
        files = {
            str(name): (entry["size"], entry["sha256"]) for name, entry in data["files"].items()
        }
        replaced = tuple(str(name) for name in data["replaced"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{what} is damaged ({error!r:.80}).") from error
    for name in (*files, *replaced):
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise UnsafeFileError(f"{what} names {name!r}, which leads out of the directory.")
    sizes = {name: size for name, (size, _) in files.items()}
    return Manifest(sizes, {name: digest for name, (_, digest) in files.items()}, replaced)


def undress(
    directory: Path, manifest: Manifest, target: Path, *, copy: bool, advance: Advance = ignore
) -> list[str]:
    """Restores the original directory; returns the names whose hash was never recorded.

    Raises:
        CheckpointError: a file is not what was recorded.
    """
    for name in manifest.sizes:
        source = original_path(directory, manifest, name)
        link_or_copy(source, target / name, copy=copy, advance=advance)
    return check_files(target, manifest, ignore)


def original_path(directory: Path, manifest: Manifest, name: str) -> Path:
    """Where a converted directory holds a file of the original.

    Raises:
        CheckpointError: it is not there.
        UnsafeFileError: it is a link that leads elsewhere.
    """
    path = directory / ORIGINALS / name if name in manifest.replaced else directory / name
    if not path.is_file():
        raise CheckpointError(f"{directory.name} lacks {name}, a file of the original.")
    check_link(directory, path)
    return path


def check_originals(directory: Path, manifest: Manifest, advance: Advance = ignore) -> None:
    """Compares the files of a converted directory with its manifest.

    Raises:
        CheckpointError: a file differs.
    """
    for name, digest in manifest.hashes.items():
        if sha256(original_path(directory, manifest, name), advance) != digest:
            raise CheckpointError(
                f"{name} is not the original: its SHA-256 differs from the one recorded at the "
                "conversion; it was changed since."
            )


def check_files(directory: Path, manifest: Manifest, advance: Advance) -> list[str]:
    """Compares the files of a restored directory with a manifest.

    Returns:
        Names of the files of which only the size could be compared.

    Raises:
        CheckpointError: a file differs.
    """
    names = list(manifest.sizes)
    for name in names:
        size = (directory / name).stat().st_size
        if size != manifest.sizes[name]:
            raise CheckpointError(
                f"{name} has {size} bytes and the original had {manifest.sizes[name]}; it was "
                "changed since the conversion."
            )
    recorded = [name for name in names if manifest.hashes[name] is not None]
    found = _hashes(directory, recorded, advance)
    for name in recorded:
        if found[name] != manifest.hashes[name]:
            raise CheckpointError(
                f"{name} is not the original: its SHA-256 differs from the one recorded at the "
                "conversion; it was changed since."
            )
    return [name for name in names if manifest.hashes[name] is None]


def record_hashes(directory: Path, manifest: Manifest, advance: Advance = ignore) -> Manifest:
    """The manifest with the hashes that were put off, also written to the directory."""
    late = [name for name in manifest.sizes if manifest.hashes[name] is None]
    paths = {name: original_path(directory, manifest, name) for name in late}
    found = {name: sha256(path, advance) for name, path in paths.items()}
    complete = Manifest(manifest.sizes, {**manifest.hashes, **found}, manifest.replaced)
    path = directory / ORIGINALS / MANIFEST
    temporary = path.with_name(f".{MANIFEST}")
    temporary.write_text(dump_json(complete.to_json()))
    temporary.replace(path)
    return complete


def restore_card(text: str) -> str:
    """A model card without our section."""
    return _SECTION.sub("", text)


def _walk(folder: Path, root: Path) -> Iterator[str]:
    for entry in sorted(folder.iterdir()):
        if entry.name in _HIDDEN:
            continue
        check_link(root, entry)
        if entry.is_dir() and not entry.is_symlink():
            yield from _walk(entry, root)
        elif entry.is_file():
            yield entry.relative_to(root).as_posix()


def _hashes(directory: Path, names: list[str], advance: Advance) -> dict[str, str | None]:
    with ThreadPoolExecutor(_HASHERS) as pool:
        digests = pool.map(lambda name: sha256(directory / name, advance), names)
        return dict(zip(names, digests, strict=True))


def _index_for(plain: Directory) -> str:
    suffix = "pytorch_model.bin" if plain.pickles else "model.safetensors"
    return f"{suffix}.index.json"


def _write_index(
    directory: Path, plain: Directory, index: str, tensors: Mapping[str, Tensor]
) -> None:
    metadata: dict[str, Any] = {}
    weight_map = dict(plain.weight_map)
    if plain.index is not None:
        metadata = read_json_file(directory / ORIGINALS / index, index).get("metadata") or {}
    for file, header in plain.headers.items():
        weight_map.update({n: file for n in header.entries if n not in weight_map})
    for file in plain.pickles:
        if plain.index is None:
            weight_map.update(dict.fromkeys(plain.shapes(), file))
    weight_map.update(dict.fromkeys(tensors, NEW_WEIGHTS))
    if isinstance(metadata.get("total_size"), int):
        added = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        metadata["total_size"] += added
    (directory / index).write_text(dump_json({"metadata": metadata, "weight_map": weight_map}))


def _write_card(directory: Path, record: Record) -> None:
    original = directory / ORIGINALS / CARD
    text = original.read_text(encoding="utf-8", errors="replace") if original.exists() else ""
    (directory / CARD).write_text(text + card_section(record), encoding="utf-8")


def card_section(record: Record) -> str:
    """What a model card says of the conversion."""
    plan = record.plan
    options = ", ".join(f"{k}={v!r}" for k, v in plan.config.to_json().items() if v is not None)
    rows = "\n".join(
        f"| `{stream.name}` | {len(stream.sublayers)} | "
        f"{' + '.join(str(len(block)) for block in stream.blocks)} | "
        f"{len(stream.sites)} | {stream.num_parameters:,} |"
        for stream in plan.streams
    )
    return f"""
<!-- attnres-compile:start -->
## Attention Residuals

This {plan.model} was converted by attnres-compile: each read of the residual stream is a learned
softmax over earlier blocks (arXiv 2603.15031). The new parameters are in `{NEW_WEIGHTS}`.

```python
import attnres_compile

model = attnres_compile.load("this directory")
```

| stream | sublayers | blocks | sites | new parameters |
|---|---|---|---|---|
{rows}

Options: {options}. `attnres-compile strip` gives the original back, bit for bit.
<!-- attnres-compile:end -->
"""


def open_plain(path: Path) -> Directory:
    """Opens a directory that must not be converted yet.

    Raises:
        AlreadyConvertedError: it is.
    """
    from attnres_compile.errors import AlreadyConvertedError

    found = open_directory(path)
    if found.marked or found.entry is not None or (path / NEW_WEIGHTS).exists():
        raise AlreadyConvertedError(
            f"{path.name} has Attention Residuals already; strip it first to convert it anew."
        )
    return found
