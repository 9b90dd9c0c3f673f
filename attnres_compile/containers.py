"""Containers as owners: nn.Sequential and its like run or index their children, but not `attnres`.

Subclasses that index or iterate in a way of their own keep it. A module whose forward asks for all
its children is passed over for the one around it; where there is none, its forward gets the others.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from typing import Any, NoReturn

from torch import nn

from attnres_compile.errors import InputError
from attnres_compile.module import is_traced

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Modules that people index and iterate over."""

_ALL_CHILDREN = frozenset(("children", "named_children", "_modules"))

Slice = Callable[[type[nn.Module], Any], nn.Module]


def asks_for_children(base: type[nn.Module]) -> bool:
    """Whether its forward asks for children that it does not name: a new one would be run too."""
    code = getattr(inspect.unwrap(base.forward), "__code__", None)
    return code is not None and bool(_ALL_CHILDREN & {*code.co_names})


def container_methods(base: type[nn.Module], guarded: Slice) -> dict[str, Any]:
    """What the subclass overrides of a container, or of a module that runs all its children.

    Args:
        base: the class that is subclassed.
        guarded: makes a slice of the layers that refuses to run on its own.
    """
    plain = _inherits(base, nn.Module, "named_children")
    children = {"named_children": _named_children} if plain and asks_for_children(base) else {}
    for kind in CONTAINERS:
        if issubclass(base, kind):
            methods = {**_METHODS[kind], **_fixed()}
            if kind is not nn.ModuleDict:
                methods["__getitem__"] = _get_item(base, kind, guarded)
            return children | {n: m for n, m in methods.items() if _inherits(base, kind, n)}
    return children


def _inherits(base: type[nn.Module], kind: type[nn.Module], name: str) -> bool:
    return getattr(base, name, None) is getattr(kind, name, base)


def _shown(self: Any) -> dict[str, nn.Module]:
    return {name: child for name, child in self._modules.items() if name != "attnres"}


def _named_children(self: Any) -> Iterator[tuple[str, nn.Module]]:
    """What a forward runs; whoever moves a model to a device or sets its mode gets all of them."""
    hidden = "attnres" if is_traced() else None
    return iter([child for child in nn.Module.named_children(self) if child[0] != hidden])


def _length(self: Any) -> int:
    return len(_shown(self))


def _iterate(self: Any) -> Iterator[nn.Module]:
    return iter(_shown(self).values())


def _iterate_names(self: Any) -> Iterator[str]:
    return iter(_shown(self))


def _contains(self: Any, name: str) -> bool:
    return name in _shown(self)


def _keys(self: Any) -> KeysView[str]:
    return _shown(self).keys()


def _items(self: Any) -> ItemsView[str, nn.Module]:
    return _shown(self).items()


def _values(self: Any) -> ValuesView[nn.Module]:
    return _shown(self).values()


_METHODS: dict[type[nn.Module], dict[str, Callable[..., Any]]] = {
    nn.Sequential: {"__len__": _length, "__iter__": _iterate},
    nn.ModuleList: {"__len__": _length, "__iter__": _iterate},
    nn.ModuleDict: {
        "__len__": _length,
        "__iter__": _iterate_names,
        "__contains__": _contains,
        "keys": _keys,
        "items": _items,
        "values": _values,
    },
}


def _get_item(base: type[nn.Module], kind: type[nn.Module], guarded: Slice) -> Callable[..., Any]:
    def __getitem__(self: Any, index: int | slice) -> Any:  # noqa: N807
        if not isinstance(index, slice):
            return list(_shown(self).values())[index]
        names = list(_shown(self).items())[index]
        named = kind is nn.Sequential
        layers: Any = OrderedDict(names) if named else [layer for _, layer in names]
        return base(layers) if is_traced() else guarded(base, layers)

    return __getitem__


def _fixed() -> dict[str, Callable[..., Any]]:
    return dict.fromkeys(("__delitem__", "insert", "clear"), _refuse_edit)


def _refuse_edit(self: Any, *_: Any) -> NoReturn:
    raise InputError(
        f"the layers of a converted {type(self).__name__} cannot be removed or moved; strip() it, "
        "edit it, and convert it again."
    )
