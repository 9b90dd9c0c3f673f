"""Does a converted ONNX model compute what its original does? Both, run in ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper

from attnres_compile.checkpoint.onnx import new_values, read_record, strip_file
from attnres_compile.checkpoint.onnx_extra import require
from attnres_compile.checkpoint.onnx_files import read_model
from attnres_compile.checkpoint.record import Record, new_tensors
from attnres_compile.comparing import Run, compare
from attnres_compile.errors import CheckpointError, InputError, in_words
from attnres_compile.passes.onnx_values import input_shapes
from attnres_compile.verification import VerifyReport, tolerance

Feeds = dict[str, "np.ndarray[Any, Any]"]


def verify_files(
    converted: Path,
    original: Path | None = None,
    given: Mapping[str, torch.Tensor] | None = None,
    *,
    seed: int = 0,
) -> VerifyReport:
    """Compares the outputs of two ONNX files on one batch of inputs.

    Args:
        converted: what `convert_file` or `save` wrote.
        original: what it was made of; left out, the original that `converted` holds.
        given: inputs by name; the others are random, integers below 2, masks all ones.
        seed: of the random inputs.

    Raises:
        InputError: a file was not converted, or has inputs that cannot be made up.
        CheckpointError: a file is damaged, or ONNX Runtime does not run it.
    """
    record = read_record(converted)
    if record is None:
        raise InputError(f"{converted.name} has no Attention Residuals; convert it first.")
    feeds = _feeds(converted, record, given or {}, seed)
    with tempfile.TemporaryDirectory() as folder:
        if original is None:
            original = Path(folder) / converted.name
            strip_file(converted, original)
        expected, actual = run_file(original, feeds), run_file(converted, feeds)
    new = new_values(converted, set(new_tensors(record.plan)))
    queries = [name for name in new if name.endswith(".query")]
    comparisons = []
    for name in dict.fromkeys([*expected, *actual]):
        plain, other = (Run(_only(name, each), {}) for each in (expected, actual))
        dtype = (plain.outputs or other.outputs)[name].dtype
        dtype = dtype if dtype.is_floating_point else torch.float64
        comparisons += compare(plain, other, dtype, tolerance(dtype, len(queries)))
    notes = ["outputs alone are compared, in ONNX Runtime; it computes no gradients."]
    trained = sum(bool(new[name].any()) for name in queries)
    if trained:
        notes.append(f"queries are trained ({trained} are not zero); equality is not expected.")
    if record.plan.config.aggregate == "mean":
        notes.append('with aggregate="mean" only scale-invariant readers see the same function.')
    return VerifyReport(record.plan.model, len(queries), tuple(comparisons), tuple(notes))


def _only(name: str, outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: outputs[name]} if name in outputs else {}


def run_file(path: Path, feeds: Feeds) -> dict[str, torch.Tensor]:
    """The outputs of a model by name.

    Raises:
        CheckpointError: ONNX Runtime does not load or run it.
    """
    require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        outputs = session.run(None, feeds)
    except Exception as error:  # its exceptions have no common base
        raise CheckpointError(
            f"ONNX Runtime does not run {path.name}: {in_words(error)}"
        ) from error
    names = [output.name for output in session.get_outputs()]
    tensors = [v for v in zip(names, outputs, strict=True) if isinstance(v[1], np.ndarray)]
    return {name: torch.from_numpy(np.array(value)) for name, value in tensors}


def _feeds(path: Path, record: Record, given: Mapping[str, torch.Tensor], seed: int) -> Feeds:
    """Inputs as given; the rest made up in the shapes of the conversion, or of those given."""
    model = read_model(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
    if not given and record.plan.inputs is not None:
        recorded = record.plan.inputs["kwargs"]
        shapes = {name: tuple(each["shape"]) for name, each in recorded.items()}
    sizes = input_shapes(model, shapes)
    types = {each.name: each.type.tensor_type.elem_type for each in model.graph.input}
    generator = np.random.default_rng(seed)
    feeds = {}
    for name, shape in sizes.items():
        if name in given:
            feeds[name] = given[name].numpy()
        else:
            feeds[name] = _made_up(name, shape, types[name], generator)
    return feeds


def _made_up(
    name: str, shape: tuple[int, ...], element: int, generator: np.random.Generator
) -> np.ndarray[Any, Any]:
    dtype = helper.tensor_dtype_to_np_dtype(element)
    if dtype.kind == "b" or (dtype.kind in "iu" and "mask" in name):
        return np.ones(shape, dtype)
    if dtype.kind in "iu":
        return generator.integers(0, 2, shape).astype(dtype)
    if dtype.kind == "f":
        return generator.standard_normal(shape).astype(dtype)
    kind = onnx.TensorProto.DataType.Name(element)
    raise InputError(f"the input {name!r} is of type {kind}, for which nothing is made up.")
