"""Tensors into a model: everything is checked before anything changes, and ties stay tied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from attnres_compile.errors import CheckpointError

Place = tuple[nn.Module, str]


def fill(model: nn.Module, tensors: Mapping[str, Tensor], place: str) -> None:
    """Gives a model the tensors of a file, in the file's dtypes, on the model's devices.

    Parameters stay the same objects, so that ties and optimizers keep hold of them; only those on
    the meta device are replaced. A name that is missing is taken from a name it is tied to.

    Raises:
        CheckpointError: names a tensor that is missing, left over, or of another shape; the model
            is unchanged then.
    """
    wanted = _groups(model)
    chosen: list[tuple[Tensor, list[tuple[str, Place]], Tensor]] = []
    for old, holders in wanted:
        name = next((name for name, _ in holders if name in tensors), None)
        if name is None:
            raise CheckpointError(
                f"{place} has no tensor {holders[0][0]}, which {type(model).__name__} needs."
            )
        _check(old, tensors[name], name, place)
        chosen.append((old, holders, tensors[name]))
    known = {name for _, holders in wanted for name, _ in holders}
    surplus = [name for name in tensors if name not in known]
    if surplus:
        raise CheckpointError(
            f"{place} has the tensor {surplus[0]}, which {type(model).__name__} does not know."
        )
    for old, holders, tensor in chosen:
        _replace(old, holders, tensor)
    _check_nothing_on_meta(model)


def tied_groups(model: nn.Module) -> list[list[str]]:
    """Names of the tensors of a model's state dict; those of one tensor stand together."""
    return [[name for name, _ in holders] for _, holders in _groups(model)]


def _groups(model: nn.Module) -> list[tuple[Tensor, list[tuple[str, Place]]]]:
    """The parameters and persistent buffers of a model with all their names and holders."""
    groups: dict[int, tuple[Tensor, list[tuple[str, Place]]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        saved = {
            **module._parameters,
            **{
                name: buffer
                for name, buffer in module._buffers.items()
                if name not in module._non_persistent_buffers_set
            },
        }
        for name, tensor in saved.items():
            if tensor is None:
                continue
            full = f"{path}.{name}" if path else name
            groups.setdefault(id(tensor), (tensor, []))[1].append((full, (module, name)))
    return list(groups.values())


def _check(old: Tensor, new: Tensor, name: str, place: str) -> None:
    if old.shape != new.shape:
        raise CheckpointError(
            f"{place}: {name} should have the shape {list(old.shape)} and has {list(new.shape)}."
        )
    if old.is_floating_point() != new.is_floating_point():
        raise CheckpointError(f"{place}: {name} should be {old.dtype} and is {new.dtype}.")


def _replace(old: Tensor, holders: list[tuple[str, Place]], tensor: Tensor) -> None:
    if old.device.type != "meta":
        old.data = tensor.detach().to(old.device)
        return
    new: Any = tensor.detach()
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for _, (module, name) in holders:
        registry = module._parameters if name in module._parameters else module._buffers
        registry[name] = new


def _check_nothing_on_meta(model: nn.Module) -> None:
    left = [n for n, tensor in model.named_buffers() if tensor.device.type == "meta"]
    if left:
        raise CheckpointError(
            f"{type(model).__name__} computes the buffer {left[0]} when it is built, and lies on "
            "the meta device, so that no file can fill it; build the model on a real device."
        )


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and persistent buffers of a model by name, tied ones under every name.

    Raises:
        CheckpointError: the model has state that is no tensor, or lies on the meta device.
    """
    tensors = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{name} of {type(model).__name__} is no tensor (extra state), which checkpoints "
                "of this package cannot hold; save the state dict with torch.save."
            )
        if value.device.type == "meta":
            raise CheckpointError(f"{name} lies on the meta device; there is nothing to save.")
        tensors[name] = value
    return tensors
