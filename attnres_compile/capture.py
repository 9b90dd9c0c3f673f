"""Capture a model as one FX graph whose nodes know the module calls they were traced in.

Three routes give the same kind of graph: Dynamo (as the compile backend sees it), torch.export
(non-strict), and a GraphModule or ExportedProgram handed in. Nothing of the model is executed:
example inputs become fake tensors.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.nn.modules import transformer

from attnres_compile.errors import CaptureError
from attnres_compile.huggingface import recording_outputs, without_cache_on_meta
from attnres_compile.passes.graph_values import CALLERS, CONSTANT, MODULE_CALLS, WEIGHT, ModuleCall
from attnres_compile.passes.inline_checkpoints import inline_checkpoints
from attnres_compile.passes.open_encoder_layers import open_encoder_layers
from attnres_compile.passes.unroll_loops import unroll_loops

Route = Literal["dynamo", "export", "graph"]


@dataclass(frozen=True)
class Captured:
    """A captured model.

    Attributes:
        module: the graph; every node's ``meta[MODULE_CALLS]`` holds the module calls around it,
            by their path in the captured model.
        route: how it was captured.
    """

    module: fx.GraphModule
    route: Route


class _CaptureDone(Exception):  # noqa: N818  not an error
    """Ends a Dynamo capture once the graph is there, before anything runs."""


def capture(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    route: Literal["dynamo", "export"] = "dynamo",
) -> Captured:
    """Captures one call of a model.

    Args:
        model: any module; it is not changed and not executed.
        args: positional inputs of the call.
        kwargs: keyword inputs of the call.
        route: Dynamo sees caches, labels, checkpointing and Python containers; export gives an
            ATen graph.

    Raises:
        CaptureError: the model cannot be captured whole; says where and what to do.
    """
    if route == "export":
        return Captured(_capture_by_export(model, args, dict(kwargs or {})), "export")
    return Captured(_capture_by_dynamo(model, args, dict(kwargs or {})), "dynamo")


def _capture_by_dynamo(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> fx.GraphModule:
    captured: list[fx.GraphModule] = []

    def stop_here(module: fx.GraphModule, _inputs: list[Any]) -> NoReturn:
        captured.append(module)
        raise _CaptureDone

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    try:
        # With gradients: within somebody's no_grad, the model's own leaves no trace in the graph.
        with tracing(model, kwargs), torch.enable_grad():
            # Static sizes, or a plan would depend on what was planned before it.
            compiled = torch.compile(call, backend=stop_here, fullgraph=True, dynamic=False)
            compiled(*args, **kwargs)
    except Exception as error:
        if not captured:
            raise capture_error(type(model).__name__, error) from error
    if not captured:
        raise CaptureError(
            f"{type(model).__name__}: the call computed nothing that can be traced; check that it "
            "is not already compiled or run under torch.compiler.disable."
        )
    open_bodies(captured[0])
    annotate_dynamo(captured[0], model)
    return captured[0]


def _capture_by_export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> fx.GraphModule:
    try:
        with tracing(model, kwargs), torch.enable_grad():
            program = torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:
        raise capture_error(type(model).__name__, error) from error
    module: fx.GraphModule = program.graph_module
    unroll_exported(module, program)
    annotate_export(module)
    return module


@contextlib.contextmanager
def tracing(model: nn.Module, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Settings under which models trace whole, around a capture and around every later call.

    Loggers and warnings are ignored, since they break a graph: transformers' ``warning_once``, or
    PyTorch's own about masks of two dtypes. Hooks are guarded, since one that is registered after
    the first call has to run too.
    """
    methods = [getattr(logging.Logger, name, None) for name in _LOGGER_METHODS]
    ignored = {method for method in methods if method is not None} | {warnings.warn}
    with (
        recording_outputs(model, kwargs),
        without_cache_on_meta(model),
        _straight_encoders(),
        torch._dynamo.config.patch(
            allow_rnn=True,
            ignore_logging_functions=torch._dynamo.config.ignore_logging_functions | ignored,
            optimize_ddp=False,
            recompile_limit=max(torch._dynamo.config.recompile_limit, 64),
            skip_nnmodule_hook_guards=False,
        ),
    ):
        yield


class _StraightEncoders:
    """``nn.TransformerEncoder`` and ``Decoder`` as one graph of open layers.

    Fused layers are off, which hide the residual additions in one operator, and a mask is not
    compared with a causal one, which no graph can branch on: what follows from the comparison is
    a hint, of no effect on values. Both are settings of the process, from when the first thread
    comes in until the last one leaves.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._fused = True
        self._detect: Any = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        self._enter()
        try:
            yield
        finally:
            self._leave()

    def _enter(self) -> None:
        with self._lock:
            if not self._inside:
                self._fused = torch.backends.mha.get_fastpath_enabled()
                self._detect = transformer._detect_is_causal_mask
                torch.backends.mha.set_fastpath_enabled(False)
                transformer._detect_is_causal_mask = _is_said_to_be_causal
            self._inside += 1

    def _leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                torch.backends.mha.set_fastpath_enabled(self._fused)
                transformer._detect_is_causal_mask = self._detect


def _is_said_to_be_causal(
    mask: Tensor | None, is_causal: bool | None = None, size: int | None = None
) -> bool:
    return is_causal is True


_straight_encoders = _StraightEncoders()
_LOGGER_METHODS = ("debug", "info", "warning", "warning_once", "info_once", "error", "exception")


def open_bodies(module: fx.GraphModule) -> None:
    """Puts what hides in graphs within a graph or in one operator where the analysis sees it."""
    inline_checkpoints(module)
    while unroll_loops(module):
        inline_checkpoints(module)
    open_encoder_layers(module)


def unroll_exported(module: fx.GraphModule, program: torch.export.ExportedProgram) -> None:
    """Unrolls the loops of a program's graph, or of a copy of that, in place."""
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    for node in module.graph.find_nodes(op="placeholder"):
        spec = specs[node.name]
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            node.meta[WEIGHT] = True
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            node.meta[CONSTANT] = program.constants[str(spec.target)]
    unroll_loops(module)


def annotate_dynamo(module: fx.GraphModule, root: nn.Module) -> None:
    """Writes module calls, as paths below `root`, into a graph from Dynamo.

    Dynamo keys its module stacks by ``id(module)``, with ``@n`` for the n-th call of one module;
    the paths it prints depend on how the call was spelled and are not read.
    """
    names = {str(id(child)): name for name, child in root.named_modules()}

    def calls(stack: Mapping[str, Any]) -> Iterator[ModuleCall]:
        for key in stack:
            identity = key.split("@")[0]
            if identity in names:
                yield ModuleCall(names[identity], key)

    _annotate(module, calls)


def annotate_export(module: fx.GraphModule, below: str = "") -> None:
    """Writes module calls, as paths below `below`, into a graph from torch.export."""
    prefix = f"{below}." if below else ""

    def calls(stack: Mapping[str, Any]) -> Iterator[ModuleCall]:
        for key, (path, _) in stack.items():
            clean = path.split("@")[0]
            if clean == below or clean.startswith(prefix):
                yield ModuleCall(clean.removeprefix(below).lstrip("."), key)

    _annotate(module, calls)


def annotate_symbolic(module: fx.GraphModule) -> None:
    """Writes module calls into a graph from symbolic_trace; its stack holds the paths as keys."""

    def calls(stack: Mapping[str, Any]) -> Iterator[ModuleCall]:
        for key, (path, _) in stack.items():
            yield ModuleCall(str(path), key)

    _annotate(module, calls)


def _annotate(
    module: fx.GraphModule, calls: Callable[[Mapping[str, Any]], Iterator[ModuleCall]]
) -> None:
    for node in module.graph.nodes:
        node.meta[MODULE_CALLS] = tuple(calls(node.meta.get("nn_module_stack") or {}))


def capture_error(name: str, error: Exception) -> CaptureError:
    """One sentence about a failed capture: the cause, the place, and ways forward."""
    place = _user_line(error)
    return CaptureError(
        f"{name} could not be captured as one graph{place}: {_cause(error).rstrip('.')}. "
        "Ways forward: pass example inputs that avoid this code path, take the offending code out "
        "of forward, or convert a submodule that can be traced. (TORCH_LOGS=graph_breaks tells "
        "more.)"
    )


_RAISED = re.compile(
    r"(?:raised exception|got) (?P<type>\w+)\((?P<quote>['\"])(?P<text>.*)(?P=quote)"
)


def _cause(error: Exception) -> str:
    """What the model's own code raised while it was traced, or else what Dynamo says itself."""
    inner = getattr(error, "inner_exception", None) or error
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    if not lines:
        return type(inner).__name__
    told = [line.partition(": ")[2] for line in lines if line.startswith(_TELLING)]
    raised = next(filter(None, map(_RAISED.search, told)), None)
    if raised is not None:
        text = raised["text"].replace("\\n", " ").replace("\\'", "'")
        return f"{raised['type']}: {text}"
    return ": ".join([lines[0].rstrip("."), *told[:1]])


_TELLING = ("Explanation: ", "Developer debug context: ")
"""How the lines of Dynamo's messages begin that say more than the first line, which is a title."""


def _user_line(error: Exception) -> str:
    stack = getattr(error, "real_stack", None)
    if not stack:
        return ""
    theirs = [frame for frame in stack if not frame.filename.endswith(CALLERS)]
    own = [frame for frame in theirs if "/torch/" not in frame.filename]
    frame = (own or theirs or stack)[-1]
    return f" at {frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} (in {frame.name})"
