"""What attnres::mix keeps for its backward pass, and holds at once without one."""

import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnres_compile.kernels import ops
from mix_cases import make_case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_keeps_no_copy_of_a_source(dtype: torch.dtype) -> None:
    case = make_case(5, (4, 8, 64), dtype=dtype)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.mix(case.sources, case.query, case.gain, eps=1e-6, aggregate="sum")
    sources = [storage_of(source) for source in case.sources]
    parameters = [storage_of(case.query), storage_of(case.gain)]
    assert set(map(storage_of, saved)).issuperset(sources + parameters)
    others = [t for t in saved if storage_of(t) not in sources + parameters]
    # A logit and an inverse RMS for each of 5 sources and 4 * 8 tokens, in float32.
    assert sum(t.untyped_storage().nbytes() for t in others) == 2 * 5 * 4 * 8 * 4


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class LargestCrowd(TorchDispatchMode):
    """Counts how many results of at least ``numel`` elements are alive at once."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel = numel
        self.most = 0
        self.alive: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() >= self.numel:
            self.alive = [ref for ref in self.alive if ref() is not None and ref() is not result]
            self.alive.append(weakref.ref(result))
            self.most = max(self.most, len(self.alive))
        return result


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2), (torch.bfloat16, 3)], ids=str)
def test_inference_holds_no_tensor_per_source(dtype: torch.dtype, most: int) -> None:
    case = make_case(8, (4, 8, 64), dtype=dtype)
    with torch.no_grad(), LargestCrowd(case.grad.numel()) as crowd:
        ops._mix_eagerly(case.sources, case.query, case.gain, 1e-6, True, -1)
    assert 0 < crowd.most <= most
