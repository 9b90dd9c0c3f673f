"""``.onnx``: models of any exporter, converted as graphs; large weights stay where they are.

A converted file holds, in its metadata, the record of its layout and the model as it was, without
the weights that both have; so stripping gives the original graph and weights again. Weights in
files of their own are never read: an output in the same directory refers to the same files, another
has copies beside it. (No links: ONNX's own loader refuses files that have two names.)
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import onnx
import onnx.checker
import torch
from google.protobuf.message import DecodeError, EncodeError
from onnx import helper

from attnres_compile.checkpoint.record import KEY, Record, check_new_tensors, new_tensors
from attnres_compile.checkpoint.writing import (
    Advance,
    check_space,
    copy_file,
    ignore,
    new_file,
)
from attnres_compile.config import AttnResConfig
from attnres_compile.errors import (
    AlreadyConvertedError,
    CheckpointError,
    InputError,
    MismatchError,
    OutputError,
    OutputExistsError,
    UnsafeFileError,
    in_words,
)
from attnres_compile.onnx_models import (
    OnnxAnalysis,
    Shapes,
    analyse_model,
    convert_model,
    inline_mixes,
)
from attnres_compile.passes.onnx_graphs import captured, subgraphs
from attnres_compile.passes.onnx_values import LARGEST_CONSTANT, array_of, label
from attnres_compile.passes.onnx_view import DTYPES
from attnres_compile.plans import ConversionPlan

ORIGINAL = f"{KEY}_original"
_LARGEST_FILE = (1 << 31) - 1  # of any protobuf message
_LARGEST_ORIGINAL = 1 << 29  # bytes that the original's graph may unfold to
_SMALL_TENSOR = 256  # bytes; a smaller one stays in the record of the original
_DATA_FIELDS = "raw_data float_data int32_data string_data int64_data double_data uint64_data"


def read_model(path: Path) -> onnx.ModelProto:
    """Reads a model without its external weights, and checks that it is one.

    Raises:
        CheckpointError: it is damaged, or weights that it refers to are missing.
        UnsafeFileError: it refers to files outside its directory.
    """
    size = path.stat().st_size
    if size > _LARGEST_FILE:
        raise CheckpointError(f"{path.name} is no ONNX model: it has {size} bytes, 2 GiB at most.")
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except DecodeError as error:
        raise CheckpointError(
            f"{path.name} is no ONNX model, or was cut off: {in_words(error)}"
        ) from error
    if not model.ir_version or not model.HasField("graph"):
        raise CheckpointError(f"{path.name} is no ONNX model, or was cut off: it has no graph.")
    _check_order(model.graph, path.name, set())
    for tensor in _external(model):
        _check_external(tensor, path)
    _check(model, path)
    return model


def read_record(path: Path) -> Record | None:
    """The layout of a converted model; None for a plain one."""
    text = _metadata(read_model(path)).get(KEY)
    return None if text is None else Record.decode(text, path.name)


def plan_file(path: Path, config: AttnResConfig, shapes: Shapes) -> ConversionPlan:
    """What `convert_file` would do."""
    return _analysed(read_model(path), path, config, shapes).plan


def convert_file(
    source: Path,
    target: Path,
    config: AttnResConfig,
    shapes: Shapes,
    *,
    inline: bool = False,
    overwrite: bool = False,
    advance: Advance = ignore,
) -> ConversionPlan:
    """Converts a model into another file.

    Args:
        source, target: ``.onnx`` files.
        config: the options.
        shapes: of inputs, for sizes that the model needs.
        inline: put the mixes into the graph, for runtimes that know no functions.
        overwrite: replace what is there.
        advance: is told of bytes of external weights as they are copied.

    Raises:
        AlreadyConvertedError: it has Attention Residuals already.
        NothingToConvertError: no residual stream can be converted.
    """
    model = read_model(source)
    analysis = _analysed(model, source, config, shapes)
    converted = convert_model(analysis)
    if inline:
        converted = inline_mixes(converted)
    _set_metadata(converted, _metadata(model))
    record = Record(analysis.plan).encode()
    _set_metadata(converted, {KEY: record, ORIGINAL: _remember(model, converted)})
    _write(converted, source, target, overwrite=overwrite, advance=advance)
    return analysis.plan


def strip_file(
    source: Path,
    target: Path,
    *,
    overwrite: bool = False,
    advance: Advance = ignore,
) -> str:
    """Writes the model that was converted; says how it was compared with the original.

    Raises:
        InputError: the file does not hold the model as it was.
    """
    model, same = _restored(source)
    _write(model, source, target, overwrite=overwrite, advance=advance)
    if same:
        return "Graph and weights have the SHA-256 recorded at the conversion."
    return "Its weights were changed after the conversion; the graph is the original's."


def new_values(path: Path, names: set[str]) -> dict[str, torch.Tensor]:
    """Some initialisers of a model by name.

    Raises:
        CheckpointError: queries or gains are not those of the layout.
    """
    model = read_model(path)
    found = {t.name: _array(t, path) for t in model.graph.initializer if t.name in names}
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in found.items()}
    record = read_record(path)
    if record is not None and set(new_tensors(record.plan)) <= names:
        shapes = {n: (str(t.dtype)[6:], tuple(t.shape)) for n, t in tensors.items()}
        check_new_tensors(record.plan, shapes, path.name)
    return tensors


def tensor_shapes(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every initialiser."""
    return {
        tensor.name: (
            str(DTYPES.get(tensor.data_type, f"torch.type {tensor.data_type}"))[6:],
            tuple(tensor.dims),
        )
        for tensor in read_model(path).graph.initializer
    }


def external_size(path: Path, target: Path | None = None) -> int:
    """Bytes in the files of a model's weights; none for a `target` that shares them."""
    places = {path.parent / _location(tensor) for tensor in _external(read_model(path))}
    if target is not None and target.absolute().parent == path.absolute().parent:
        return 0
    return sum(place.stat().st_size for place in places)


def _analysed(
    model: onnx.ModelProto, path: Path, config: AttnResConfig, shapes: Shapes
) -> OnnxAnalysis:
    if KEY in _metadata(model):
        raise AlreadyConvertedError(f"{path.name} has Attention Residuals already; strip it.")
    small = {
        tensor.name: _array(tensor, path)
        for tensor in model.graph.initializer
        if math.prod(tensor.dims) <= LARGEST_CONSTANT and tensor.data_type in DTYPES
    }
    return analyse_model(model, path.name, config, small, shapes)


def _array(tensor: onnx.TensorProto, path: Path) -> Any:
    """The numbers of a tensor, of which only its own bytes are read."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return array_of(tensor)
    entries = {entry.key: entry.value for entry in tensor.external_data}
    own = onnx.TensorProto()
    own.CopyFrom(tensor)
    own.ClearField("external_data")
    own.data_location = onnx.TensorProto.DEFAULT
    with (path.parent / entries["location"]).open("rb") as file:
        file.seek(int(entries.get("offset", 0)))
        own.raw_data = file.read(_num_bytes(tensor))
    return array_of(own)


def _check_order(graph: onnx.GraphProto, place: str, outside: set[str]) -> None:
    """Every value is made once, before it is read."""
    known = {*outside, *(v.name for v in graph.input), *(t.name for t in graph.initializer)}
    known.update(t.values.name for t in graph.sparse_initializer)
    for node in graph.node:
        for name in (*node.input, *captured(node)):
            if name and name not in known:
                raise _out_of_order(graph, node, name, place)
        for _, body in subgraphs(node):
            _check_order(body, place, known)
        known.update(node.output)


def _out_of_order(
    graph: onnx.GraphProto, node: onnx.NodeProto, name: str, place: str
) -> CheckpointError:
    later = any(name in each.output for each in graph.node)
    why = (
        "which is made by it or after it: the graph is cyclic, or its nodes are not in order"
        if later
        else "which nothing makes"
    )
    return CheckpointError(
        f"{place} is no valid ONNX model: {label(node)} ({node.op_type}) reads {name!r}, {why}."
    )


def _check(model: onnx.ModelProto, path: Path) -> None:
    """ONNX's own checks, as far as they know the operators; not of what lies in other files."""
    external = list(_external(model))
    try:
        onnx.checker.check_model(_with_inputs_for_external(model) if external else str(path))
    except (onnx.checker.ValidationError, RuntimeError) as error:
        if "No Op registered" in str(error):  # a runtime's own, of which the checker knows nothing
            return
        raise CheckpointError(f"{path.name} is no valid ONNX model: {in_words(error)}") from error


def _with_inputs_for_external(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which external weights are inputs, so that nothing looks for their files."""
    light = onnx.ModelProto()
    light.CopyFrom(model)
    kept = []
    declared = {value.name for value in light.graph.input}
    for tensor in light.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            kept.append(tensor)
        elif tensor.name not in declared:
            light.graph.input.append(
                helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    del light.graph.initializer[:]
    light.graph.initializer.extend(kept)
    return light


def _external(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for tensor in _all_tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield tensor


def _all_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _node_tensors(node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
    for _, body in subgraphs(node):
        yield from _graph_tensors(body)


def _location(tensor: onnx.TensorProto) -> str:
    return next((e.value for e in tensor.external_data if e.key == "location"), "")


def _check_external(tensor: onnx.TensorProto, path: Path) -> None:
    """The file of a weight lies in the model's directory and holds all of it."""
    location = _location(tensor)
    what = f"{path.name} keeps {tensor.name} in {location!r}"
    parts = {*PurePosixPath(location).parts, *PureWindowsPath(location).parts}
    absolute = PurePosixPath(location).is_absolute() or PureWindowsPath(location).anchor
    if not location or absolute or ".." in parts:
        raise UnsafeFileError(f"{what}, which leads out of its directory; refused.")
    file = path.parent / location
    if not file.resolve().is_relative_to(path.parent.resolve()):
        raise UnsafeFileError(f"{what}, a link that leads out of its directory; refused.")
    if not file.is_file():
        raise CheckpointError(f"{what}, which is missing; put that file beside the model.")
    entries = {entry.key: entry.value for entry in tensor.external_data}
    try:
        offset = int(entries.get("offset", 0))
        length = int(entries.get("length", _num_bytes(tensor)))
    except ValueError as error:
        raise CheckpointError(f"{what} at no valid place: {in_words(error)}") from error
    size = file.stat().st_size
    if offset < 0 or length != _num_bytes(tensor) or offset + length > size:
        raise CheckpointError(
            f"{what}, bytes {offset} to {offset + length} of {size}, where "
            f"{_num_bytes(tensor)} bytes should be; that file is cut off or another's."
        )


def _num_bytes(tensor: onnx.TensorProto) -> int:
    if any(size < 0 for size in tensor.dims):
        raise CheckpointError(f"the tensor {tensor.name} has a negative size.")
    try:
        bits = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * 8
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"the tensor {tensor.name} is of no known type.") from error
    name = onnx.TensorProto.DataType.Name(tensor.data_type)
    if name in ("INT4", "UINT4", "FLOAT4E2M1"):  # two in a byte
        bits = 4
    return int(math.prod(tensor.dims) * bits + 7) // 8


def _metadata(model: onnx.ModelProto) -> dict[str, str]:
    return {each.key: each.value for each in model.metadata_props}


def _set_metadata(model: onnx.ModelProto, values: dict[str, str]) -> None:
    merged = {**_metadata(model), **values}
    del model.metadata_props[:]
    for key, value in merged.items():
        model.metadata_props.add(key=key, value=value)


def _named_tensors(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Weights of the main graph by a name that converting keeps."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            tensors.update((node.output[0], a.t) for a in node.attribute if a.HasField("t"))
    return tensors


def _remember(original: onnx.ModelProto, converted: onnx.ModelProto) -> str:
    """The original as text, without the data of weights that the converted model has as well."""
    skeleton = onnx.ModelProto()
    skeleton.CopyFrom(original)
    kept = _named_tensors(converted)
    blank = []
    for name, tensor in _named_tensors(skeleton).items():
        if tensor.ByteSize() > _SMALL_TENSOR and name in kept and kept[name] == tensor:
            blank.append(name)
            for each in _DATA_FIELDS.split():
                tensor.ClearField(each)
    data = base64.b64encode(zlib.compress(skeleton.SerializeToString(), 9)).decode()
    return json.dumps({"sha256": _digest(original), "blank": blank, "model": data})


def _restored(path: Path) -> tuple[onnx.ModelProto, bool]:
    """The model that a file was converted from, and whether it is that to the bit."""
    converted = read_model(path)
    text = _metadata(converted).get(ORIGINAL)
    if text is None:
        raise InputError(
            f"{path.name} was exported from a converted model and does not hold the plain one; "
            "strip the model by attnres_compile.strip and export that."
        )
    weights = _named_tensors(converted)
    try:
        data = json.loads(text)
        unfolding = zlib.decompressobj()
        content = unfolding.decompress(base64.b64decode(data["model"]), _LARGEST_ORIGINAL)
        if not unfolding.eof:
            raise ValueError("it is too large or cut off")
        model = onnx.load_model_from_string(content)
        tensors = _named_tensors(model)
        for name in data["blank"]:
            tensors[name].CopyFrom(weights[name])
        expected = str(data["sha256"])
    except (ValueError, KeyError, TypeError, zlib.error, binascii.Error, DecodeError) as error:
        raise CheckpointError(
            f"{path.name}: the record of the original model is damaged: {in_words(error)}"
        ) from error
    for tensor in _external(model):
        _check_external(tensor, path)
    return model, _digest(model) == expected


def _digest(model: onnx.ModelProto) -> str:
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def _write(
    model: onnx.ModelProto, source: Path, target: Path, *, overwrite: bool, advance: Advance
) -> None:
    """The model, and its external weights beside it."""
    locations = dict.fromkeys(_location(tensor) for tensor in _external(model))
    for location in locations:
        _check_place(source.parent / location, target, location, overwrite=overwrite)
    foreign = [
        each for each in locations if not _is_same(source.parent / each, target.parent / each)
    ]
    check_space(target, sum((source.parent / each).stat().st_size for each in foreign))
    try:
        content = model.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise OutputError(
            f"{target} would have more than 2 GiB; save the original with external data, and "
            "convert that."
        ) from error
    with new_file(target, overwrite=overwrite) as written:
        for location in foreign:
            copy_file(source.parent / location, written.parent / location, advance)
        written.write_bytes(content)
        try:
            _check(model, written)
        except CheckpointError as error:
            raise MismatchError(f"the rewrite failed, please report this: {error}") from error
        for location in foreign:
            place = target.parent / location
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(written.parent / location, place)


def _check_place(weights: Path, target: Path, location: str, *, overwrite: bool) -> None:
    place = target.parent / location
    if place == target:
        raise OutputExistsError(f"{target} is the name of the model's weights; name another.")
    if place.exists() and not overwrite and not _is_same(weights, place):
        raise OutputExistsError(
            f"{place} exists already, and the weights of {target.name} go there; name an output in "
            "another directory, or say overwrite."
        )


def _is_same(weights: Path, place: Path) -> bool:
    return place.exists() and place.samefile(weights)
