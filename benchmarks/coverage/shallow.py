"""Make a built model shallow: of equal blocks in a row two stay, or two turns of two kinds.

A stage of 6 or 36 blocks of one kind tells a sweep nothing that 2 of them do not. Whatever the
library, stages are `nn.Sequential` or `nn.ModuleList`, and equal blocks have equal classes and
shapes all the way down. What else a model does with the number of its blocks is not known, so it
is run after each cut, and a cut that it does not survive is undone.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

KEPT = 2
_GEOMETRY = ("stride", "dilation", "groups")

Children = dict[str, nn.Module]


def make_shallow(model: nn.Module, run: Callable[[], object]) -> int:
    """Cuts a model in place, and returns how many blocks it has lost.

    Args:
        model: cut wherever a list of modules has more than `KEPT` equal blocks in a row.
        run: calls the model; it raises where the model needs what was cut.
    """
    cuts = [(container, _shortened(container)) for container in _containers(model)]
    cuts = [(container, kept) for container, kept in cuts if len(kept) < len(container)]
    if not cuts:
        return 0
    before = _count(model)
    if not _survives(cuts, run):
        for cut in cuts:
            _survives([cut], run)
    return before - _count(model)


def depth_of_repeats(model: nn.Module) -> int | None:
    """In how many lists stand the blocks that follow equal ones, or take turns; None without any.

    The outermost such blocks count. In a list in a list there may be the branches of one block.
    """
    depths = {name: _depth(model, name) for name, m in model.named_modules() if _repeats(m)}
    return min(depths.values(), default=None)


def _repeats(module: nn.Module) -> bool:
    """Whether it is a list in which equal blocks follow each other, or two kinds take turns."""
    if not isinstance(module, nn.Sequential | nn.ModuleList):
        return False
    signatures = [_signature(block) for block in module.children() if _is_block(block)]
    for period in (1, 2):
        equal = [a == b for a, b in zip(signatures, signatures[period:], strict=False)]
        if any(all(equal[i : i + period]) for i in range(len(equal) - period + 1)):
            return True
    return False


def _depth(model: nn.Module, path: str) -> int:
    """In how many lists a module stands, itself counted."""
    names = path.split(".") if path else []
    around = [model.get_submodule(".".join(names[:n])) for n in range(len(names) + 1)]
    return sum(isinstance(module, nn.Sequential | nn.ModuleList) for module in around)


def _survives(cuts: list[tuple[nn.Module, Children]], run: Callable[[], object]) -> bool:
    """Whether the model runs with these cuts; they are undone where it does not."""
    originals = [dict(container._modules) for container, _ in cuts]
    for container, kept in cuts:
        _replace(container, kept)
    try:
        run()
    except Exception:  # whatever a model does when it misses blocks
        for (container, _), original in zip(cuts, originals, strict=True):
            _replace(container, original)
        return False
    return True


def _replace(container: nn.Module, children: dict[str, nn.Module | None] | Children) -> None:
    container._modules.clear()
    container._modules.update(children)


def _shortened(container: nn.Sequential | nn.ModuleList) -> Children:
    """The children that stay; numbered anew, where their names are numbers."""
    kept = list(container.named_children())
    for period in (1, 2):  # two kinds of blocks may take turns
        kept = _without_repeats(kept, period)
    if all(name.isdigit() for name, _ in kept):
        return {str(number): child for number, (_, child) in enumerate(kept)}
    return dict(kept)


def _without_repeats(
    children: list[tuple[str, nn.Module]], period: int
) -> list[tuple[str, nn.Module]]:
    """Without the blocks that equal those `period` before them, from the third such turn on."""
    signatures = [_signature(child) for _, child in children]
    kept, equal = [], 0
    for index, child in enumerate(children):
        same = index >= period and signatures[index] == signatures[index - period]
        equal = equal + 1 if same and _is_block(child[1]) else 0
        if equal <= period * (KEPT - 1):
            kept.append(child)
    return kept


def _is_block(module: nn.Module) -> bool:
    """More than a layer and its norm: those may be one of a block's branches."""
    return sum(bool(list(part.parameters(recurse=False))) for part in module.modules()) > 2


def _signature(module: nn.Module) -> tuple[object, ...]:
    """Classes, shapes and strides of a module and all that is in it."""
    return tuple(
        (
            name,
            type(part),
            tuple((key, tuple(p.shape)) for key, p in part.named_parameters(recurse=False)),
            tuple(str(getattr(part, each, None)) for each in _GEOMETRY),
        )
        for name, part in module.named_modules()
    )


def _containers(model: nn.Module) -> list[nn.Sequential | nn.ModuleList]:
    return [m for m in model.modules() if isinstance(m, nn.Sequential | nn.ModuleList)]


def _count(model: nn.Module) -> int:
    return sum(len(container) for container in _containers(model))
