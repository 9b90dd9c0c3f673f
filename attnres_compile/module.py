"""What a converted model is made of: new parameters, the owner's subclass, and the marker operator.

The *owner* of a stream (LlamaModel, T5Stack, ...) becomes an instance of a generated subclass of
its class. Its forward declares the new parameters through the marker ``attnres::declare`` and runs
the original forward; the rewrite that follows replaces the marker by mixes. Whatever executes the
marker was about to compute the unconverted network, so the marker raises.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._higher_order_ops.effects import _register_effectful_op
from torch._library.effects import EffectType

from attnres_compile.errors import UnconvertedPathError
from attnres_compile.layout import OwnerLayout

UNCONVERTED = (
    "this path would have computed the network without its Attention Residuals, so it stops here. "
    "The converted module was run by something that does not rewrite it: an outer torch.compile "
    "with another backend (use torch.compile(..., backend='attnres', fullgraph=True)), "
    "torch.export (use attnres_compile.export), the force_eager stance or torch.compiler.disable "
    "(call it outside of them), or a method that bypasses the converted forward."
)


@torch.library.custom_op(
    "attnres::declare", mutates_args=(), schema="(Tensor[] parameters, str layout) -> ()"
)
def declare(parameters: list[Tensor], layout: str) -> None:
    """Stands in a captured graph where an owner starts; executing it is an error."""
    raise UnconvertedPathError(UNCONVERTED)


@declare.register_fake
def _declare_fake(parameters: list[Tensor], layout: str) -> None:
    """Tracing passes over it: the rewrite comes after."""


# Effectful, so that no dead-code elimination can remove it and leave the unconverted network.
_register_effectful_op(torch.ops.attnres.declare.default, EffectType.ORDERED)


class AttnResSite(nn.Module):
    """The parameters of one site: a query [D] and, optionally, a key gain [D]."""

    def __init__(
        self, width: int, *, gain: bool, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(width, dtype=dtype, device=device))
        ones = torch.ones(width, dtype=dtype, device=device)
        self.gain = nn.Parameter(ones) if gain else None

    def extra_repr(self) -> str:
        return f"width={self.query.numel()}, gain={self.gain is not None}"


class AttnRes(nn.Module):
    """All sites of an owner, one child per site, named after what it stands before.

    Attributes:
        layout: the streams of the owner, as the rewrite needs them.
        executor: how the rewritten graph runs, "eager" or "attnres".
    """

    def __init__(
        self, layout: OwnerLayout, sites: dict[str, AttnResSite], executor: str = "eager"
    ) -> None:
        super().__init__()
        self.layout = layout
        self.encoded_layout = layout.encode()
        self.executor = executor
        for name, site in sites.items():
            self.add_module(name, site)

    def declared(self) -> list[Tensor]:
        """Queries and gains in the order of the layout's sites."""
        sites = [site for site in self.children() if isinstance(site, AttnResSite)]
        return [p for site in sites for p in (site.query, site.gain) if p is not None]


class Owner(nn.Module):
    """Mixin of every generated owner class."""

    _attnres_base: ClassVar[type[nn.Module]]
    attnres: AttnRes

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so copies and pickles name its base instead.
        state = self.__getstate__()  # type: ignore[no-untyped-call]
        return rebuild_owner, (type(self)._attnres_base,), state


class Guard(nn.Module):
    """Mixin of containers between an owner and its layers, which hold no parameters themselves."""

    _attnres_base: ClassVar[type[nn.Module]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            raise UnconvertedPathError(
                f"this {type(self).__name__} is a part of a converted model, whose Attention "
                "Residuals belong to the module around it; call that module instead."
            )
        declare([], "")
        return type(self)._attnres_base.forward(self, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = self.__getstate__()  # type: ignore[no-untyped-call]
        return rebuild_guard, (type(self)._attnres_base,), state


_OWNERS: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()


def live_owner(identity: int) -> nn.Module | None:
    """The owner module with this ``id``, if it is alive."""
    return _OWNERS.get(identity)


def is_converted(model: nn.Module) -> bool:
    return any(isinstance(module, Owner) for module in model.modules())


def owners(model: nn.Module) -> list[tuple[str, Owner]]:
    """The owners in a model, with their paths."""
    return [(n, module) for n, module in model.named_modules() if isinstance(module, Owner)]


def rebuild_owner(base: type[nn.Module]) -> nn.Module:
    """An empty instance of the owner class of `base`; its state is set by copy or pickle."""
    owner = nn.Module.__new__(owner_class(base))
    _OWNERS[id(owner)] = owner
    return owner


def rebuild_guard(base: type[nn.Module]) -> nn.Module:
    return nn.Module.__new__(guard_class(base))


def become_owner(module: nn.Module, attnres: AttnRes) -> None:
    """Turns a (copied) module into an owner."""
    module.__class__ = owner_class(type(module))
    _OWNERS[id(module)] = module
    module.add_module("attnres", attnres)


def become_guard(module: nn.Module) -> None:
    module.__class__ = guard_class(type(module))


def leave_class(module: nn.Module) -> None:
    """Takes an owner or guard back to its original class."""
    assert isinstance(module, Owner | Guard)
    base: Any = type(module)._attnres_base
    module.__class__ = base


def guard_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a container that refuses to run on its own."""
    return _made_once(base, Guard, dict)


def owner_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `base` that declares its Attention Residuals and runs converted."""
    return _made_once(base, Owner, lambda: _converted_methods(base))


_CLASSES: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def _made_once(
    base: type[nn.Module], mixin: type[nn.Module], methods: Callable[[], dict[str, Any]]
) -> type[nn.Module]:
    if (base, mixin) not in _CLASSES:
        _CLASSES[base, mixin] = _subclass(base, mixin, methods())
    return _CLASSES[base, mixin]


def _converted_methods(base: type[nn.Module]) -> dict[str, Any]:
    methods = {"forward": _converted_forward(base)}
    for name, function in _own_methods(base).items():
        methods[name] = _watched_method(name, function)
    return methods


def _subclass(base: type[nn.Module], mixin: type, methods: dict[str, Any]) -> type[nn.Module]:
    names = {
        # transformers keys its output capturing on the class's names
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_attnres_base": base,
    }
    made: type[nn.Module] = type(base.__name__, (mixin, base), {**names, **methods})
    return made


def _own_methods(base: type[nn.Module]) -> dict[str, Callable[..., Any]]:
    """Methods that could run the layers on a way of their own: those of classes with a forward."""
    found: dict[str, Callable[..., Any]] = {}
    for cls in reversed(base.__mro__):
        if not issubclass(cls, nn.Module) or cls is nn.Module or "forward" not in vars(cls):
            continue
        found.update({n: f for n, f in vars(cls).items() if inspect.isfunction(f)})
    return {n: f for n, f in found.items() if n != "forward" and not n.startswith("__")}


def _converted_forward(base: type[nn.Module]) -> Callable[..., Any]:
    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            declare(self.attnres.declared(), self.attnres.encoded_layout)
            return base.forward(self, *args, **kwargs)
        from attnres_compile.execution import run_converted

        return run_converted(self, "forward", args, kwargs)

    return forward


def _watched_method(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(self, *args, **kwargs)
        from attnres_compile.execution import run_method

        return run_method(self, name, function, args, kwargs)

    return method
