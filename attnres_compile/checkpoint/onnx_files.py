"""``.onnx`` files: reading with every check, and writing; weights may have files of their own."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import onnx
import onnx.checker
from google.protobuf.message import DecodeError, EncodeError
from onnx import helper

from attnres_compile.checkpoint.writing import Advance, check_space, copy_file, new_file
from attnres_compile.errors import (
    CheckpointError,
    MismatchError,
    OutputError,
    OutputExistsError,
    UnsafeFileError,
    in_words,
)
from attnres_compile.passes.onnx_graphs import captured, subgraphs
from attnres_compile.passes.onnx_values import array_of, label

_LARGEST_FILE = (1 << 31) - 1  # of any protobuf message


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
    for tensor in external_tensors(model):
        check_external(tensor, path)
    _check(model, path)
    return model


def external_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for tensor in _all_tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield tensor


def location_of(tensor: onnx.TensorProto) -> str:
    return next((e.value for e in tensor.external_data if e.key == "location"), "")


def tensor_array(tensor: onnx.TensorProto, path: Path) -> Any:
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


def metadata_of(model: onnx.ModelProto) -> dict[str, str]:
    return {each.key: each.value for each in model.metadata_props}


def set_metadata(model: onnx.ModelProto, values: dict[str, str]) -> None:
    merged = {**metadata_of(model), **values}
    del model.metadata_props[:]
    for key, value in merged.items():
        model.metadata_props.add(key=key, value=value)


def write_model(
    model: onnx.ModelProto, source: Path, target: Path, *, overwrite: bool, advance: Advance
) -> None:
    """The model, and its external weights beside it."""
    locations = dict.fromkeys(location_of(tensor) for tensor in external_tensors(model))
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


def check_external(tensor: onnx.TensorProto, path: Path) -> None:
    """The file of a weight lies in the model's directory and holds all of it."""
    location = location_of(tensor)
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
    external = list(external_tensors(model))
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
