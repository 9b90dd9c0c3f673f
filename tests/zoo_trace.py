"""Residual streams of one eager run, found without graphs and without the package under test.

Every operator that a model executes is recorded with its data dependences, and the definition of
a residual addition is applied to the record as it stands. It sees values, not code: dropout and
no-op casts leave no trace in eval mode, so that it can confirm a count but never a refusal.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
ADDITIONS = {aten.add.Tensor, aten.add_.Tensor}
RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default}
RESHAPES |= {aten.squeeze.dim, aten.alias.default, aten.detach.default, aten.clone.default}
# They move values but compute none; a slice or a roll, in contrast, mixes positions.
REARRANGEMENTS = RESHAPES | {aten.t.default, aten.transpose.int, aten.permute.default}
REARRANGEMENTS |= {aten.expand.default, aten._to_copy.default, aten.copy_.default}


@dataclasses.dataclass
class Value:
    """One version of a tensor; `ancestors` and `mixed_from` are sets of indices, as bits."""

    index: int
    operator: Any
    inputs: tuple[Value, ...]
    shape: torch.Size
    dtype: torch.dtype
    ancestors: int = 0
    # The ancestors from which some path leads here through an operator that is not element-wise.
    mixed_from: int = 0
    # The state that this value is, but for a summand that the stream has no part in.
    absorbed_in: Value | None = None

    def carried(self) -> Value:
        """The value itself, before reshapes, clones, widening casts and absorbed summands."""
        if self.absorbed_in is not None:
            return self.absorbed_in.carried()
        if self.operator in RESHAPES:
            return self.inputs[0].carried()
        if self.operator is aten._to_copy.default:
            source = self.inputs[0]
            if source.dtype.is_floating_point and self.dtype.itemsize >= source.dtype.itemsize:
                return source.carried()
        return self


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.values: list[Value] = []
        self.current: dict[int, Value] = {}
        self.by_storage: dict[int, dict[int, Tensor]] = defaultdict(dict)

    def value(self, tensor: Tensor) -> Value:
        if id(tensor) not in self.current:
            self.record(tensor, None, ())
        return self.current[id(tensor)]

    def record(self, tensor: Tensor, operator: Any, inputs: tuple[Value, ...]) -> None:
        index = len(self.values)
        value = Value(index, operator, inputs, tensor.shape, tensor.dtype, ancestors=1 << index)
        elementwise = operator is None or torch.Tag.pointwise in operator.tags
        for source in inputs:
            value.ancestors |= source.ancestors
            keeps_positions = elementwise or operator in REARRANGEMENTS
            value.mixed_from |= source.mixed_from if keeps_positions else source.ancestors
        self.values.append(value)
        self.current[id(tensor)] = value
        # Holding the tensor keeps its id from being used again.
        self.by_storage[tensor.untyped_storage()._cdata][id(tensor)] = tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        inputs = tuple(self.value(tensor) for tensor in tensors)
        result = func(*args, **kwargs)
        for tensor in pytree.tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            overwritten = any(tensor is known for known in tensors)
            self.record(tensor, func, inputs)
            if overwritten:
                self.renew_aliases(tensor, func)
        return result

    def renew_aliases(self, written: Tensor, operator: Any) -> None:
        """After a write, what shares the storage depends on what was written."""
        source = self.current[id(written)]
        for alias in list(self.by_storage[written.untyped_storage()._cdata].values()):
            if alias is not written:
                self.record(alias, operator, (self.current[id(alias)], source))


@dataclasses.dataclass(frozen=True)
class TracedStream:
    depth: int
    sublayers: int


def trace_streams(model: nn.Module, args: Any, kwargs: Any) -> list[TracedStream]:
    """All residual streams of one forward pass, the short ones too, in the order they begin."""
    with Recorder() as recorder:
        output = model(*args, **kwargs)
        kept = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        results = {recorder.value(tensor).carried().index for tensor in kept}

    skips: dict[int, Value] = {}  # addition -> the state before it
    for value in recorder.values:
        if value.operator not in ADDITIONS or not are_alike(*value.inputs):
            continue
        if (skip := find_skip(value, skips)) is not None:
            skips[value.index] = skip
        else:
            value.absorbed_in = find_absorbing(value, skips)

    # An outer skip leaves its state after the inner stream does: the last addition continues.
    successor = {skip.index: index for index, skip in sorted(skips.items())}
    reads = count_reads(recorder.values, skips)
    streams = []
    for start, skip in sorted(skips.items(), key=lambda item: item[1].index):
        continues = skip.index in skips and successor[skip.index] == start
        if continues:
            continue
        chain = [start]
        while chain[-1] in successor:
            chain.append(successor[chain[-1]])
        inner = [index for index in chain[:-1] if index in results or reads[index]]
        streams.append(TracedStream(len(chain), len(inner) + 1))
    return streams


def are_alike(*inputs: Value) -> bool:
    """Two operands that could be a state and a branch."""
    shapes = {value.shape for value in inputs}
    floating = all(value.dtype.is_floating_point for value in inputs)
    return len(inputs) == 2 and len(shapes) == 1 and len(inputs[0].shape) > 1 and floating


def find_skip(value: Value, skips: dict[int, Value]) -> Value | None:
    """The state to which this addition adds a branch, if that is what it does."""
    left, right = value.inputs
    for skip, branch in ((left, right), (right, left)):
        state: Value | None = skip.carried()
        while state is not None:
            if branch.mixed_from >> state.index & 1:
                return skip.carried()
            state = skips.get(state.index)
    return None


def find_absorbing(value: Value, skips: dict[int, Value]) -> Value | None:
    """The state to which this addition adds something that depends on no state of the stream."""
    left, right = value.inputs
    for skip, other in ((left, right), (right, left)):
        state = skip.carried()
        if state.index not in skips:
            continue
        chain = [state]
        while chain[-1].index in skips:
            chain.append(skips[chain[-1].index])
        if not any(other.ancestors >> earlier.index & 1 for earlier in chain):
            return state
    return None


def count_reads(values: list[Value], skips: dict[int, Value]) -> dict[int, int]:
    """How often each state is read by anything but the skip of an addition."""
    reads: dict[int, int] = defaultdict(int)
    for value in values:
        if value.carried() is not value:
            continue
        for source in value.inputs:
            reads[source.carried().index] += 1
        if value.index in skips:
            reads[skips[value.index].index] -= 1
    return reads
