"""The ``attnres`` backend of torch.compile: rewrite, schedule, lower, and hand on to Inductor."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast, get_args

import torch
from torch import fx

from attnres_compile.errors import BackendError
from attnres_compile.kernels import cache as source_cache
from attnres_compile.passes.lower import Kernels, lower
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
        options: ``{"kernels": "auto" | "triton" | "reference", "print_kernels": bool}`` and
            Inductor's own options. "auto" is generated Triton kernels on a GPU and a C++ library
            on a CPU; "triton" on a CPU needs TRITON_INTERPRET=1; "reference" runs the mixes in
            plain PyTorch. With "print_kernels" this process prints to stderr the file of each
            Triton kernel that it generates, at the kernel's first launch.
        mode: as torch.compile takes it.

    Raises:
        MismatchError: a converted model's graph does not hold the sites of its plan.
        BackendError: unknown kernels, options or mode, kernels that cannot run here, or no C++
            compiler where one is needed.
    """
    patches = {name.replace("-", "_"): value for name, value in (options or {}).items()}
    kernels = patches.pop("kernels", "auto")
    if kernels not in get_args(Kernels):
        raise BackendError(f"kernels={kernels!r} is unknown; use one of {get_args(Kernels)}.")
    print_kernels = patches.pop("print_kernels", False)
    if not isinstance(print_kernels, bool):
        raise BackendError(f"print_kernels={print_kernels!r} is no bool; use True or False.")
    unknown = sorted(patches.keys() - torch._inductor.config.get_config_copy().keys())
    if unknown:
        raise BackendError(
            f"option {unknown[0]!r} is neither 'kernels' nor 'print_kernels' nor one of "
            "Inductor's; torch._inductor.list_options() names those."
        )
    modes = torch._inductor.list_mode_options()
    if (mode or "default") not in modes:
        raise BackendError(f"mode={mode!r} is unknown; use one of {tuple(modes)}.")
    patches = {**modes[mode or "default"], **patches}
    rewritten = rewrite_dynamo_graph(module, None)
    if not rewritten and not _has_mixes(module):
        warnings.warn(
            "backend='attnres' was given a graph without Attention Residuals and compiles it as "
            "Inductor would; attnres_compile.convert(model) adds them. If the model is converted, "
            "a graph break has split this part off; fullgraph=True shows where.",
            stacklevel=2,
        )
    if print_kernels:
        source_cache.print_kernels()
    return compile_rewritten(module, inputs, kernels, patches)


def compile_rewritten(
    module: fx.GraphModule,
    inputs: list[Any],
    kernels: Kernels = "auto",
    patches: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Lowers the mixes of a rewritten graph and hands it on to Inductor.

    Raises:
        BackendError: kernels that cannot run here, or no C++ compiler where one is needed.
    """
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.custom_graph_pass import get_custom_graph_passes
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    from attnres_compile.passes.inline_cpp_phases import InlineCppPhases

    lower(module.graph, kernels)
    module.graph.lint()
    module.recompile()
    recompute_tags(module.graph)
    with torch._inductor.config.patch(patches or {}):
        passes = get_custom_graph_passes(torch._inductor.config.post_grad_custom_post_pass)
    patches = {**(patches or {}), "post_grad_custom_post_pass": [*passes, InlineCppPhases()]}
    try:
        compiled: Any = compile_fx(module, inputs, config_patches=patches)
    except (InductorError, InvalidCxxCompiler) as error:
        cause = error.inner_exception if isinstance(error, InductorError) else error
        if not isinstance(cause, InvalidCxxCompiler):
            raise
        raise BackendError(
            "Inductor needs a C++ compiler for the CPU and found none; install one (g++ or "
            "clang), or run the converted model with executor='eager'."
        ) from error
    return cast("Callable[..., Any]", compiled)


def _has_mixes(module: fx.GraphModule) -> bool:
    mixes = (torch.ops.attnres.mix, torch.ops.attnres.mix.default)
    return any(node.target in mixes for node in module.graph.nodes)
