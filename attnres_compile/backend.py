"""The ``attnres`` backend of torch.compile: rewrite at every marker, then hand on to Inductor."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from attnres_compile.errors import AttnResError
from attnres_compile.passes.outline_checkpoints import recompute_tags
from attnres_compile.rewriting import rewrite_dynamo_graph


def attnres_backend(
    module: fx.GraphModule, inputs: list[Any], **options: Any
) -> Callable[..., Any]:
    """Compiles a captured graph: ``torch.compile(converted, backend="attnres", fullgraph=True)``.

    A graph without Attention Residuals is compiled as by Inductor, with one warning.

    Raises:
        MismatchError: a converted model's graph does not hold the sites of its plan.
    """
    rewritten = rewrite_dynamo_graph(module, None)
    if not rewritten and not _has_mixes(module):
        warnings.warn(
            "backend='attnres' was given a graph without Attention Residuals and compiles it as "
            "Inductor would; attnres_compile.convert(model) adds them.",
            stacklevel=2,
        )
    return lower(module, inputs, **options)


def lower(module: fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
    """Hands a rewritten graph on to Inductor."""
    from torch._inductor.compile_fx import compile_fx

    recompute_tags(module.graph)
    try:
        return compile_fx(module, inputs, config_patches=options.get("options"))  # type: ignore[return-value]
    except torch._inductor.exc.InvalidCxxCompiler as error:
        raise _no_compiler() from error


def _has_mixes(module: fx.GraphModule) -> bool:
    return any(node.target is torch.ops.attnres.mix.default for node in module.graph.nodes)


def _no_compiler() -> AttnResError:
    from attnres_compile.errors import BackendError

    return BackendError(
        "Inductor needs a C++ compiler for the CPU and found none; install one (g++ or clang), or "
        "run the converted model with executor='eager'."
    )
