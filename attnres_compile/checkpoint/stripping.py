"""A converted checkpoint back to the plain one, file to file, checked against recorded hashes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from attnres_compile.checkpoint import dressing, pt, pt2
from attnres_compile.checkpoint import safetensors as st
from attnres_compile.checkpoint.converting import Options, check_output
from attnres_compile.checkpoint.huggingface import (
    CONFIG,
    NEW_WEIGHTS,
    Directory,
    dump_json,
    open_directory,
)
from attnres_compile.checkpoint.names import foreign_names
from attnres_compile.checkpoint.onnx_extra import onnx_files
from attnres_compile.checkpoint.record import KEY, Record, new_tensors
from attnres_compile.checkpoint.saving import check_readable, plain_model
from attnres_compile.checkpoint.sources import Source, record_of
from attnres_compile.checkpoint.writing import (
    check_space,
    new_directory,
    new_file,
    sha256,
    torch_file,
)
from attnres_compile.errors import CheckpointError, InputError


@dataclass(frozen=True)
class Stripped:
    """What came out of stripping.

    Attributes:
        checked: how the result was compared with the original, as a sentence.
        trained: how many sites had a query that is not zero.
    """

    checked: str
    trained: int


def strip_source(source: Source, output: Path, options: Options) -> Stripped:
    """Writes the plain checkpoint that a converted one was made of.

    Raises:
        InputError: it was never converted.
        CheckpointError: what comes out is not the original that was recorded.
    """
    check_readable(source.path)
    check_output(source, output, options)
    record = record_of(source)
    if record is None:
        raise InputError(
            f"{source.path.name} has no Attention Residuals of attnres_compile; nothing to strip."
        )
    trained = count_trained(source, record)
    if source.suffix == "":
        checked = _strip_directory(open_directory(source.path), record, output, options)
    elif source.suffix == ".pt2":
        pt2.strip_file(source.path, output, overwrite=options.overwrite)
        checked = "Graph and weights are those of the program that was converted."
    elif source.suffix == ".onnx":
        checked = onnx_files().strip_file(
            source.path,
            output,
            overwrite=options.overwrite,
            advance=options.advance,
        )
    elif source.suffix == ".safetensors":
        checked = _strip_safetensors(source.path, record, output, options)
    else:
        checked = _strip_pt(source, record, output, options)
    return Stripped(checked, trained)


def count_trained(source: Source, record: Record) -> int:
    """How many queries are not zero."""
    tensors = new_values(source, record)
    return sum(bool(t.any()) for name, t in tensors.items() if name.endswith(".query"))


def new_values(source: Source, record: Record) -> dict[str, torch.Tensor]:
    """Queries and gains of a checkpoint by our own names, without reading anything else.

    Raises:
        CheckpointError: one is missing.
    """
    ours = dict.fromkeys(new_tensors(record.plan))
    theirs = {name: name for name in ours}
    if record.names != "native":
        theirs = foreign_names(record.plan, record.names)
    found = _some_tensors(source, set(theirs.values()))
    lacking = [name for name in theirs.values() if name not in found]
    if lacking:
        raise CheckpointError(
            f"{source.path.name} has no tensor {lacking[0]}, which its layout needs."
        )
    return {name: found[theirs[name]].reshape(-1) for name in ours}


def _some_tensors(source: Source, names: set[str]) -> dict[str, torch.Tensor]:
    if source.suffix == ".pt2":
        state = pt2.read_program(source.path).state_dict
        return {name: state[name] for name in names & set(state)}
    if source.suffix == ".onnx":
        return dict(onnx_files().new_values(source.path, names))
    if source.suffix in pt.SUFFIXES:
        loaded = pt.read_pickle(source.path) if source.allow_pickle else pt.read_file(source.path)
        state = loaded.state_dict() if isinstance(loaded, nn.Module) else loaded
        tensors = state if isinstance(loaded, nn.Module) else pt.state_dict_of(state, source.path)
        return {name: tensors[name] for name in names & set(tensors)}
    found: dict[str, torch.Tensor] = {}
    for header in _headers(source):
        found.update(st.read_tensors(header, sorted(names & set(header.entries))))
    return found


def _headers(source: Source) -> list[st.Header]:
    if source.suffix == ".safetensors":
        return [st.read_header(source.path)]
    directory = open_directory(source.path)
    new = directory.new_weights()
    return [*directory.headers.values(), *([new] if new is not None else [])]


def _strip_directory(directory: Directory, record: Record, output: Path, options: Options) -> str:
    manifest = dressing.read_manifest(directory.path)
    if manifest is None:
        return _strip_saved(directory, record, output, options)
    if options.copy:
        check_space(output, sum(manifest.sizes.values()))
    with new_directory(output, overwrite=options.overwrite) as folder:
        unhashed = dressing.undress(
            directory.path, manifest, folder, copy=options.copy, advance=options.advance
        )
    if unhashed:
        return (
            f"No hash was recorded for {len(unhashed)} files (first: {unhashed[0]}); their sizes "
            "match."
        )
    return f"All {len(manifest.sizes)} files have the SHA-256 recorded at the conversion."


def _strip_saved(directory: Directory, record: Record, output: Path, options: Options) -> str:
    """Strips what ``save_pretrained`` wrote, where the new parameters lie among the others."""
    names = set(new_tensors(record.plan))
    if directory.pickles:
        raise InputError(
            f"{directory.path.name} keeps its weights in pickles and has no record of an original; "
            "load it, strip the model, and save that."
        )
    files = dressing.files_in(directory.path)
    with new_directory(output, overwrite=options.overwrite) as folder:
        kept = [f for f in files if f not in directory.headers and f not in _own(directory)]
        dressing.copy_files(directory.path, folder, kept, copy=options.copy)
        for file, header in directory.headers.items():
            st.without_tensors(
                header, folder / file, names, dropped_keys=(KEY,), advance=options.advance
            )
        if directory.index is not None:
            _write_index(directory, folder, names)
        if directory.config is not None:
            (folder / CONFIG).write_text(dump_json(directory.config))
    return "It was saved after the conversion, so that there are no recorded hashes to compare."


def _own(directory: Directory) -> set[str]:
    return {CONFIG, NEW_WEIGHTS, *([directory.index] if directory.index else [])}


def _write_index(directory: Directory, folder: Path, dropped: set[str]) -> None:
    from attnres_compile.checkpoint.huggingface import read_json_file

    assert directory.index is not None
    data = read_json_file(directory.path / directory.index, directory.index)
    data["weight_map"] = {n: f for n, f in directory.weight_map.items() if n not in dropped}
    (folder / directory.index).write_text(dump_json(data))


def _strip_safetensors(path: Path, record: Record, output: Path, options: Options) -> str:
    header = st.read_header(path)
    check_space(output, path.stat().st_size)
    with new_file(output, overwrite=options.overwrite) as file:
        if st.ORIGIN in header.metadata:
            hashed = st.restore_original(header, file, advance=options.advance)
            return (
                f"The file has the SHA-256 recorded at the conversion: {sha256(file)}."
                if hashed
                else "No hash was recorded at the conversion; header and data are the original's."
            )
        names = set(new_tensors(record.plan))
        if record.names != "native":
            theirs = foreign_names(record.plan, record.names)
            names = {*theirs.values(), *(n for n in header.entries if n in record.extras)}
        st.without_tensors(header, file, names, dropped_keys=(KEY,), advance=options.advance)
    return "It was saved after the conversion, so that there is no recorded hash to compare."


def _strip_pt(source: Source, record: Record, output: Path, options: Options) -> str:
    loaded = pt.read_pickle(source.path) if source.allow_pickle else pt.read_file(source.path)
    if isinstance(loaded, nn.Module):
        with new_file(output, overwrite=options.overwrite) as written, torch_file(written) as file:
            torch.save(plain_model(loaded), file)
        return "A pickled module holds no hash; the module is the one that was converted."
    names = {*new_tensors(record.plan), *record.extras}
    if record.names != "native":
        names |= set(foreign_names(record.plan, record.names).values())
    hashed = pt.write_stripped(loaded, source.path, output, names, overwrite=options.overwrite)
    if not hashed:
        return "It was saved after the conversion, so that there is no recorded hash to compare."
    return "All tensors have the SHA-256 recorded at the conversion; the file was written anew."
