"""What a converted model is made of: new parameters, owners and guards, and the marker operator.

The *owner* of a stream (LlamaModel, T5Stack, ...) becomes an instance of a generated subclass of
its class. Its forward declares the new parameters through the marker ``attnres::declare`` and runs
the original forward; the rewrite that follows replaces the marker by mixes. Whatever executes the
marker was about to compute the unconverted network, so the marker raises.
"""

from __future__ import annotations

import weakref
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

NOT_A_LAYER = (
    "attnres holds the parameters of Attention Residuals and is no layer: this forward runs all "
    "the children of its module; let it name the layers that it runs."
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


def is_traced() -> bool:
    """Whether this very call is being traced, by Dynamo or torch.export.

    ``torch.compiler.is_compiling()`` is true in every other thread too while one compiles.
    """
    return torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting()


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
        ways_to_layers: the owner's methods, other than forward, that may run its layers.
    """

    def __init__(
        self, layout: OwnerLayout, sites: dict[str, AttnResSite], executor: str = "eager"
    ) -> None:
        super().__init__()
        self.layout = layout
        self.encoded_layout = layout.encode()
        self.executor = executor
        self.ways_to_layers: frozenset[str] = frozenset()
        for name, site in sites.items():
            self.add_module(name, site)

    def declared(self) -> list[Tensor]:
        """Queries and gains in the order of the layout's sites."""
        sites = [site for site in self.children() if isinstance(site, AttnResSite)]
        return [p for site in sites for p in (site.query, site.gain) if p is not None]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise UnconvertedPathError(NOT_A_LAYER)


class Owner(nn.Module):
    """Mixin of every generated owner class."""

    _attnres_base: ClassVar[type[nn.Module]]
    attnres: AttnRes


class Guard(nn.Module):
    """Mixin of containers between an owner and its layers, which hold no parameters themselves."""

    _attnres_base: ClassVar[type[nn.Module]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not is_traced():
            raise UnconvertedPathError(
                f"this {type(self).__name__} is a part of a converted model, whose Attention "
                "Residuals belong to the module around it; call that module instead."
            )
        declare([], "")
        return type(self)._attnres_base.forward(self, *args, **kwargs)


_OWNERS: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()


def register_owner(owner: nn.Module) -> None:
    """Lets a rewrite find the owner by the ``id`` that Dynamo's module stacks hold."""
    _OWNERS[id(owner)] = owner


def live_owner(identity: int) -> nn.Module | None:
    """The owner module with this ``id``, if it is alive."""
    return _OWNERS.get(identity)


def live_owners() -> list[Owner]:
    """All owners that are alive."""
    return [owner for owner in _OWNERS.values() if isinstance(owner, Owner)]


def is_converted(model: nn.Module) -> bool:
    return any(isinstance(module, Owner) for module in model.modules())


def owners(model: nn.Module) -> list[tuple[str, Owner]]:
    """The owners in a model, with their paths."""
    return [(n, module) for n, module in model.named_modules() if isinstance(module, Owner)]


def leave_class(module: nn.Module) -> None:
    """Takes an owner or guard back to its original class."""
    assert isinstance(module, Owner | Guard)
    base: Any = type(module)._attnres_base
    module.__class__ = base
