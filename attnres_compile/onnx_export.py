"""Export a converted model to ONNX: each mix becomes a call of a function ``attnres::Mix<n>``."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import onnxscript
import torch
from onnx.defs import OpSchema
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attnres_compile.checkpoint.record import KEY, Record
from attnres_compile.checkpoint.writing import new_file
from attnres_compile.errors import CaptureError, OutputExistsError, in_words
from attnres_compile.exporting import export
from attnres_compile.inputs import infer_inputs
from attnres_compile.passes.onnx_mix import (
    DOMAIN,
    DOMAIN_VERSION,
    mix_attributes,
    mix_function,
    mix_name,
)

_LARGEST_INLINE = 1_500_000_000  # bytes of weights; a file of ONNX has 2 GiB at most
_ELEMENTS = ("tensor(float)", "tensor(double)", "tensor(float16)", "tensor(bfloat16)")


def save_onnx(
    converted: nn.Module,
    path: Path,
    record: Record,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    *,
    overwrite: bool,
) -> None:
    """Exports a converted model into a file, with every dynamic axis that the model allows.

    Weights above 1.5 GB go into a file of their own, ``<path>.data``.

    Raises:
        CaptureError: torch cannot export the model.
        OutputError: the file cannot be written.
    """
    external = _num_bytes(converted) > _LARGEST_INLINE
    weights = path.with_name(f"{path.name}.data")
    for place in (path, *([weights] if external else [])):
        if place.exists() and not overwrite:
            raise OutputExistsError(
                f"{place} exists already; name another output, or overwrite it."
            )
    if not args and not kwargs:
        args, kwargs = infer_inputs(converted)
    kwargs = dict(kwargs or {})
    shapes = _all_dynamic(converted, args, kwargs)
    program = export(converted, args, kwargs, dynamic_shapes=shapes)
    arities: set[int] = set()
    try:
        exported = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            custom_translation_table={torch.ops.attnres.mix.default: _translation(arities)},
        )
    except Exception as error:  # torch wraps whatever went wrong in several layers
        reason = in_words(_innermost(error))
        raise CaptureError(
            f"{type(converted).__name__} was exported by torch.export, and torch's ONNX exporter "
            f"cannot translate it (eager attention is easier for it than a fused one): {reason}"
        ) from error
    assert exported is not None
    model: Any = exported.model
    gain = record.plan.config.key_gain
    opset = model.opset_imports[""]
    for sources in sorted(arities):
        function = mix_function(sources, gain=gain, opset=opset)
        made = onnx_ir.serde.deserialize_function(function)
        model.functions[made.identifier()] = made
    model.opset_imports[DOMAIN] = DOMAIN_VERSION
    model.metadata_props[KEY] = record.encode()
    with new_file(path, overwrite=overwrite) as written:
        exported.save(str(written), external_data=external)
        onnx.checker.check_model(str(written))
        if external:
            os.replace(written.with_name(weights.name), weights)


def _translation(arities: set[int]) -> Callable[..., Any]:
    """What the exporter puts in the place of ``attnres::mix``; notes the numbers of sources."""

    def translate(
        sources: Sequence[Any], query: Any, gain: Any, eps: float, count: bool, dim: int
    ) -> tuple[Any]:
        arities.add(len(sources))
        inputs = [*sources, query, *([gain] if gain is not None else [])]
        first = sources[0]
        settings = mix_attributes(
            len(sources),
            channel_dim=dim,
            rank=len(first.shape),
            double=first.dtype == onnx_ir.DataType.DOUBLE,
            eps=eps,
            sums=count,
        )
        schema = _schema(mix_name(len(sources)), len(inputs), settings)
        call = onnxscript.values.Op(
            onnxscript.values.Opset(DOMAIN, DOMAIN_VERSION), schema.name, schema
        )
        # The operator's further outputs are for the backward pass; nothing reads them here.
        return (call(*inputs, **settings),)

    return translate


def _schema(name: str, inputs: int, settings: Mapping[str, Any]) -> OpSchema:
    """Types of a mix, which onnxscript wants to know before it calls it."""
    kinds = {int: OpSchema.AttrType.INT, float: OpSchema.AttrType.FLOAT}
    parameter = OpSchema.FormalParameter
    return OpSchema(
        name,
        DOMAIN,
        DOMAIN_VERSION,
        inputs=[parameter(f"input_{i}", "T") for i in range(inputs)],
        outputs=[parameter("mixed", "T")],
        type_constraints=[("T", list(_ELEMENTS), "floating")],
        attributes=[
            OpSchema.Attribute(key, kinds.get(type(value), OpSchema.AttrType.INTS))
            for key, value in settings.items()
        ],
    )


def _all_dynamic(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Every axis of every input as dynamic as the model lets it be."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs)

    def shape(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        return dict.fromkeys(range(leaf.dim()), torch.export.Dim.AUTO)

    return pytree.tree_map(shape, dict(bound.arguments))


def _num_bytes(model: nn.Module) -> int:
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
