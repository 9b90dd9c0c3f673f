"""Run a converted owner: its own forward, captured by Dynamo, rewritten, and executed.

Each owner has compiled functions of its own, kept outside of the module so that copies and pickles
do not carry them. They have code objects of their own too, since Dynamo counts recompilations per
code object.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import fx, nn

from attnres_compile.capture import capture_error, tracing
from attnres_compile.errors import AttnResError, CaptureError, UnconvertedPathError
from attnres_compile.module import UNCONVERTED, Owner, declare
from attnres_compile.passes.outline_checkpoints import outline_checkpoints
from attnres_compile.passes.restore_unbind import restore_unbind
from attnres_compile.rewriting import rewrite_dynamo_graph

_COMPILED: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, bool], Callable[..., Any]]] = (
    weakref.WeakKeyDictionary()
)
_NUMBER = itertools.count()
_DYNAMO_ERRORS = (
    torch._dynamo.exc.TorchDynamoException,
    torch._dynamo.exc.FailOnRecompileLimitHit,
)


def run_converted(owner: Owner, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls a method of an owner with its Attention Residuals.

    Raises:
        MismatchError: this call takes another path through the model than the plan.
        CaptureError: it cannot be captured whole.
        UnconvertedPathError: compilation is switched off around it.
    """
    with tracing(owner, kwargs), _unwatched():
        try:
            return _compiled(owner, method)(owner, *args, **kwargs)
        except _DYNAMO_ERRORS as error:
            _explain(owner, error)


def run_method(
    owner: Owner,
    name: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Calls another method than forward: converted if it runs layers with sites, else as it is."""
    layout = owner.attnres.layout
    if name in layout.methods:
        return run_converted(owner, name, args, kwargs)
    if _watched.parts:
        return function(owner, *args, **kwargs)
    try:
        with _watching(_parts(owner, layout.layers)):
            result = function(owner, *args, **kwargs)
            return iter(list(result)) if inspect.isgenerator(result) else result
    except _ReachedLayer:
        return run_converted(owner, name, args, kwargs)


def _parts(owner: Owner, layers: tuple[str, ...]) -> set[nn.Module]:
    """All modules in which sublayers may lie: the layers, what is around and what is in them.

    Where the owner itself makes the additions, any of its children may be a sublayer.
    """
    inside = [owner.get_submodule(path) for path in layers] or list(owner.children())
    return {part for module in inside for part in module.modules()} - {owner.attnres}


class _ReachedLayer(BaseException):
    """A watched method was about to run a layer outside of the converted forward.

    Not an Exception, so that no fallback in the method catches it.
    """


class _Watched(threading.local):
    """What the watched methods of this thread may not run, by the id of the hook that stops it."""

    def __init__(self) -> None:
        self.parts: dict[int, set[nn.Module]] = {}


_watched = _Watched()


@contextlib.contextmanager
def _watching(parts: set[nn.Module]) -> Iterator[None]:
    def stop(module: nn.Module, _args: Any) -> None:
        if module in _watched.parts.get(handle.id, ()):
            raise _ReachedLayer

    handle = nn.modules.module.register_module_forward_pre_hook(stop)
    _watched.parts[handle.id] = parts
    try:
        yield
    finally:
        handle.remove()
        del _watched.parts[handle.id]


@contextlib.contextmanager
def _unwatched() -> Iterator[None]:
    """Inside a converted call layers run as they should; our hooks would be traced."""
    hooks = nn.modules.module._global_forward_pre_hooks
    watched, _watched.parts = _watched.parts, {}
    ours = {identity: hooks.pop(identity) for identity in watched}
    try:
        yield
    finally:
        hooks.update(ours)
        _watched.parts = watched


def _compiled(owner: Owner, method: str) -> Callable[..., Any]:
    functions = _COMPILED.setdefault(owner, {})
    # Dynamo traces the hooks of all modules where there are some, but does not look for new ones.
    key = (method, bool(nn.modules.module._has_any_global_hook()))  # type: ignore[no-untyped-call]
    if key not in functions:
        functions[key] = _compile(owner, method)
    return functions[key]


def _compile(owner: Owner, method: str) -> Callable[..., Any]:
    base = type(owner)._attnres_base
    original = getattr(base, method)
    reference = weakref.ref(owner)
    executor = owner.attnres.executor

    def body(self: Any, *args: Any, **kwargs: Any) -> Any:
        declare(self.attnres.declared(), self.attnres.encoded_layout)
        return original(self, *args, **kwargs)

    def backend(module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        rewrite_dynamo_graph(module, reference())
        if executor == "attnres":
            from attnres_compile.backend import compile_rewritten

            return compile_rewritten(module, inputs)
        restore_unbind(module)
        return outline_checkpoints(module).forward

    # By this name Dynamo remembers sizes that changed: with a name in common, the second of two
    # owners of one class would start with symbolic sizes, and a Swin stage take a minute to trace.
    name = f"attnres_{base.__name__}_{method}_{next(_NUMBER)}"
    own = types.FunctionType(
        body.__code__.replace(co_name=name),
        body.__globals__,
        closure=body.__closure__,
    )
    return torch.compile(own, backend=backend, fullgraph=True)


def _explain(owner: nn.Module, error: Exception) -> NoReturn:
    """Our own errors as they were raised; Dynamo's as one sentence."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, AttnResError):
            raise cause from None
        cause = getattr(cause, "inner_exception", None) or cause.__cause__ or cause.__context__
    name = type(owner).__name__
    if torch._C._are_functorch_transforms_active():
        raise CaptureError(
            f"{name} is converted, and cannot be called under a transform of torch.func (grad, "
            "vmap, jvp and what is made of them): its mixes have derivatives in reverse mode only, "
            "and no rules for batches of calls. Use backward() or torch.autograd.grad, for "
            "gradients of single samples one sample at a time."
        ) from error
    if isinstance(error, torch._dynamo.exc.FailOnRecompileLimitHit):
        raise UnconvertedPathError(
            f"{name} was called in more ways (shapes, modes, dtypes) than Dynamo's recompile "
            "limit admits; raise torch._dynamo.config.recompile_limit, or keep sizes dynamic. "
            + UNCONVERTED
        ) from error
    raise capture_error(name, error) from error
