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
import zlib
from pathlib import Path

import numpy as np
import onnx
import onnx.checker
import torch
from google.protobuf.message import DecodeError

from attnres_compile.checkpoint.onnx_files import (
    check_external,
    external_tensors,
    location_of,
    metadata_of,
    read_model,
    set_metadata,
    tensor_array,
    write_model,
)
from attnres_compile.checkpoint.record import KEY, Record, check_new_tensors, new_tensors
from attnres_compile.checkpoint.writing import (
    Advance,
    ignore,
)
from attnres_compile.config import AttnResConfig
from attnres_compile.errors import (
    AlreadyConvertedError,
    CheckpointError,
    InputError,
    in_words,
)
from attnres_compile.onnx_models import (
    OnnxAnalysis,
    Shapes,
    analyse_model,
    convert_model,
    inline_mixes,
)
from attnres_compile.passes.onnx_values import LARGEST_CONSTANT
from attnres_compile.passes.onnx_view import DTYPES
from attnres_compile.plans import ConversionPlan

ORIGINAL = f"{KEY}_original"
_LARGEST_ORIGINAL = 1 << 29  # bytes that the original's graph may unfold to
_SMALL_TENSOR = 256  # bytes; a smaller one stays in the record of the original
_DATA_FIELDS = "raw_data float_data int32_data string_data int64_data double_data uint64_data"


def read_record(path: Path) -> Record | None:
    """The layout of a converted model; None for a plain one."""
    text = metadata_of(read_model(path)).get(KEY)
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
    set_metadata(converted, metadata_of(model))
    record = Record(analysis.plan).encode()
    set_metadata(converted, {KEY: record, ORIGINAL: _remember(model, converted)})
    write_model(converted, source, target, overwrite=overwrite, advance=advance)
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
    write_model(model, source, target, overwrite=overwrite, advance=advance)
    if same:
        return "Graph and weights have the SHA-256 recorded at the conversion."
    return "Its weights were changed after the conversion; the graph is the original's."


def new_values(path: Path, names: set[str]) -> dict[str, torch.Tensor]:
    """Some initialisers of a model by name.

    Raises:
        CheckpointError: queries or gains are not those of the layout.
    """
    model = read_model(path)
    found = {t.name: tensor_array(t, path) for t in model.graph.initializer if t.name in names}
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
    places = {path.parent / location_of(tensor) for tensor in external_tensors(read_model(path))}
    if target is not None and target.absolute().parent == path.absolute().parent:
        return 0
    return sum(place.stat().st_size for place in places)


def _analysed(
    model: onnx.ModelProto, path: Path, config: AttnResConfig, shapes: Shapes
) -> OnnxAnalysis:
    if KEY in metadata_of(model):
        raise AlreadyConvertedError(f"{path.name} has Attention Residuals already; strip it.")
    small = {
        tensor.name: tensor_array(tensor, path)
        for tensor in model.graph.initializer
        if math.prod(tensor.dims) <= LARGEST_CONSTANT and tensor.data_type in DTYPES
    }
    return analyse_model(model, path.name, config, small, shapes)


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
    text = metadata_of(converted).get(ORIGINAL)
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
    for tensor in external_tensors(model):
        check_external(tensor, path)
    return model, _digest(model) == expected


def _digest(model: onnx.ModelProto) -> str:
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
