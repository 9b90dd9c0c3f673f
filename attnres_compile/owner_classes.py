"""The generated subclasses: an owner's forward declares its parameters and runs converted.

Classes are made once per original class and keep its names. Copies and pickles of an instance name
the original class and make the subclass anew.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from attnres_compile.containers import container_methods
from attnres_compile.execution import run_converted, run_method
from attnres_compile.module import AttnRes, Guard, Owner, declare, is_traced, register_owner


def rebuild_owner(base: type[nn.Module]) -> nn.Module:
    """An empty instance of the owner class of `base`; its state is set by copy or pickle."""
    owner = nn.Module.__new__(owner_class(base))
    register_owner(owner)
    return owner


def rebuild_guard(base: type[nn.Module]) -> nn.Module:
    """An empty instance of the guard class of `base`."""
    return nn.Module.__new__(guard_class(base))


def become_owner(module: nn.Module, attnres: AttnRes) -> None:
    """Turns a (copied) module into an owner."""
    attnres.ways_to_layers = ways_to_layers(type(module), attnres.layout.layers)
    module.__class__ = owner_class(type(module))
    register_owner(module)
    module.add_module("attnres", attnres)


def become_guard(module: nn.Module) -> None:
    """Turns a (copied) container into a guard."""
    module.__class__ = guard_class(type(module))


def guard_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a container that refuses to run on its own."""
    return _made_once(base, Guard, lambda: _sliced_methods(base))


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
    return {**methods, **container_methods(base, _guarded)}


def _sliced_methods(base: type[nn.Module]) -> dict[str, Any]:
    """Of the container methods a guard, which holds no `attnres`, needs that for slices."""
    methods = container_methods(base, _guarded)
    return {"__getitem__": methods["__getitem__"]} if "__getitem__" in methods else {}


def _guarded(base: type[nn.Module], layers: Any) -> nn.Module:
    container = base(layers)
    become_guard(container)
    return container


def _subclass(base: type[nn.Module], mixin: type, methods: dict[str, Any]) -> type[nn.Module]:
    names = {
        # transformers keys its output capturing on the class's names
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_attnres_base": base,
        "__init__": _init_plain(base),
        "__reduce_ex__": _reduce_with(rebuild_owner if mixin is Owner else rebuild_guard),
    }
    made: type[nn.Module] = type(base.__name__, (mixin, base), {**names, **methods})
    return made


def _init_plain(base: type[nn.Module]) -> Callable[..., None]:
    """What the class itself makes, when it is called, was never converted."""

    @functools.wraps(base.__init__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        self.__class__ = base
        base.__init__(self, *args, **kwargs)

    return __init__


def _reduce_with(rebuild: Callable[[type[nn.Module]], nn.Module]) -> Callable[..., Any]:
    def __reduce_ex__(self: Any, protocol: Any) -> Any:  # noqa: N807
        return rebuild, (type(self)._attnres_base,), self.__getstate__()

    return __reduce_ex__


def _own_methods(base: type[nn.Module]) -> dict[str, Callable[..., Any]]:
    """Methods that could run the layers on a way of their own."""
    found: dict[str, Callable[..., Any]] = {}
    for cls in reversed(base.__mro__):
        if not _knows_no_layers(cls):
            found.update({n: f for n, f in vars(cls).items() if inspect.isfunction(f)})
    return {n: f for n, f in found.items() if n != "forward" and not n.startswith("__")}


def _knows_no_layers(cls: type) -> bool:
    """Bases that libraries give to all their models, like PreTrainedModel, have no forward."""
    library = cls.__module__.partition(".")[0] in ("torch", "transformers", "huggingface_hub")
    return cls in (object, nn.Module) or (library and "forward" not in vars(cls))


_ANY_CHILD = frozenset(
    "children named_children modules named_modules get_submodule _modules __dict__".split()
)
"""Names by which code reaches children that it does not name."""


def ways_to_layers(base: type[nn.Module], layers: Sequence[str]) -> frozenset[str]:
    """Methods that name a layer, or something around one, or a method that does.

    Args:
        base: the owner's original class.
        layers: paths, below the owner, of the modules that hold additions.
    """
    names = {name: _names(function.__code__) for name, function in _own_methods(base).items()}
    wanted = _ANY_CHILD | {path.partition(".")[0] for path in layers}
    ways: frozenset[str] = frozenset()
    while True:
        more = frozenset(name for name, used in names.items() if used & (wanted | ways))
        if more == ways:
            return ways
        ways = more


def _names(code: types.CodeType) -> frozenset[str]:
    """Attribute names and strings (for getattr) in a function and the functions within it."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, str):
            found.add(constant)
        elif isinstance(constant, types.CodeType):
            found |= _names(constant)
    return frozenset(found)


def _converted_forward(base: type[nn.Module]) -> Callable[..., Any]:
    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_traced():
            declare(self.attnres.declared(), self.attnres.encoded_layout)
            return base.forward(self, *args, **kwargs)
        return run_converted(self, "forward", args, kwargs)

    return forward


def _watched_method(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_traced():
            return run_method(self, name, function, args, kwargs)
        if name in self.attnres.ways_to_layers:
            # Redundant when the owner's forward calls the method, and removed by its rewrite.
            declare(self.attnres.declared(), self.attnres.encoded_layout)
        return function(self, *args, **kwargs)

    return method
