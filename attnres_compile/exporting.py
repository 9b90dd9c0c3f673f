"""Export a converted model: torch.export, then the rewrite at the marker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from attnres_compile.capture import capture_error, tracing, unroll_exported
from attnres_compile.errors import InputError
from attnres_compile.inputs import infer_inputs
from attnres_compile.kernels import plain_mix
from attnres_compile.module import is_converted
from attnres_compile.rewriting import rewrite_export_graph


def export(
    converted: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    decompose: bool = False,
) -> torch.export.ExportedProgram:
    """Exports a converted model for saving, ONNX, AOTInductor and the like.

    Args:
        converted: what `convert` returned.
        args, kwargs: example inputs; inferred where the model says what it takes.
        dynamic_shapes: as `torch.export.export` takes it.
        decompose: replace ``attnres.mix`` by PyTorch's own operators, so that the program runs
            where this package is not installed.

    Returns:
        An ExportedProgram with ``attnres.mix`` nodes, or their decomposition.

    Raises:
        InputError: the model was not converted.
        CaptureError: torch.export cannot trace it.
        MismatchError: the exported graph does not hold the plan's sites.

    Example:
        >>> import attnres_compile, torch, torchvision
        >>> model = attnres_compile.convert(torchvision.models.vit_b_16().eval())
        >>> program = attnres_compile.export(model, (torch.randn(2, 3, 224, 224),))
        >>> program.module()(torch.randn(2, 3, 224, 224)).shape
        torch.Size([2, 1000])
    """
    if not is_converted(converted):
        raise InputError(f"{type(converted).__name__} was not converted; use torch.export itself.")
    if not args and not kwargs:
        args, kwargs = infer_inputs(converted)
    try:
        with tracing(converted, kwargs or {}):
            program: torch.export.ExportedProgram = torch.export.export(
                converted, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=False
            )
    except Exception as error:
        raise capture_error(type(converted).__name__, error) from error
    # A state that the program returns is named in its signature.
    with program.graph_module._set_replace_hook(program.graph_signature.get_replace_hook()):
        unroll_exported(program.graph_module, program)
        rewrite_export_graph(program.graph_module)
    program.validate()  # type: ignore[no-untyped-call]
    if decompose:
        table = torch.export.default_decompositions()
        table[torch.ops.attnres.mix.default] = plain_mix.decomposition
        program = program.run_decompositions(table)
    return program
