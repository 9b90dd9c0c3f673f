"""The ``attnres`` backend of torch.compile: rewrite at every marker, then hand on to Inductor."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx

from attnres_compile.errors import BackendError
from attnres_compile.passes.outline_checkpoints import recompute_tags
from attnres_compile.rewriting import rewrite_dynamo_graph


def attnres_backend(
    module: fx.GraphModule,
    inputs: list[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compiles a captured graph: ``torch.compile(converted, backend="attnres", fullgraph=True)``.

    A graph without Attention Residuals is compiled as by Inductor, with one warning.

    Args:
        module: torch-level graph from Dynamo; taken over.
        inputs: its example inputs.
        options: ``{"kernels": "auto" | "reference"}`` and Inductor's own options. Both settings run
            the operator in plain PyTorch; generated kernels are not a part of this version.
        mode: as torch.compile takes it.

    Raises:
        MismatchError: a converted model's graph does not hold the sites of its plan.
        BackendError: unknown kernels, or no C++ compiler where one is needed.
    """
    patches = dict(options or {})
    kernels = patches.pop("kernels", "auto")
    if kernels not in ("auto", "reference"):
        raise BackendError(
            f"kernels={kernels!r} is not available in this version; use 'auto' or 'reference'."
        )
    if mode is not None:
        patches = {**torch._inductor.list_mode_options(mode), **patches}
    rewritten = rewrite_dynamo_graph(module, None)
    if not rewritten and not _has_mixes(module):
        warnings.warn(
            "backend='attnres' was given a graph without Attention Residuals and compiles it as "
            "Inductor would; attnres_compile.convert(model) adds them.",
            stacklevel=2,
        )
    return lower(module, inputs, patches)


def lower(
    module: fx.GraphModule, inputs: list[Any], patches: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """Hands a rewritten graph on to Inductor.

    Raises:
        BackendError: the graph runs on a CPU and there is no C++ compiler.
    """
    from torch._inductor.compile_fx import compile_fx

    recompute_tags(module.graph)
    try:
        compiled: Any = compile_fx(module, inputs, config_patches=patches)
    except torch._inductor.exc.InductorError as error:
        if not isinstance(error.inner_exception, torch._inductor.exc.InvalidCxxCompiler):
            raise
        raise BackendError(
            "Inductor needs a C++ compiler for the CPU and found none; install one (g++ or "
            "clang), or run the converted model with executor='eager'."
        ) from error
    return cast("Callable[..., Any]", compiled)


def _has_mixes(module: fx.GraphModule) -> bool:
    mixes = (torch.ops.attnres.mix, torch.ops.attnres.mix.default)
    return any(node.target in mixes for node in module.graph.nodes)
