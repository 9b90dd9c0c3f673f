"""The operators ``attnres::mix`` and ``attnres::mix_backward``, registered with PyTorch.

Being operators they are one node each in any graph, whatever captured it, and a pass can find and
lower them. What is registered here is their schema, shapes for tracing, the gradient, and two
implementations: the one pass of the C++ library for rows on a CPU, and plain PyTorch for all else,
or everywhere with ``kernels="reference"``. ``reference.py`` is the specification.

The backward pass keeps references to the sources and two scalars per source and token, the logit
and the inverse RMS of the source; nothing of the size of a source. With ``w = query * gain``,
``r`` the inverse RMS, ``l`` the logit, ``a`` the softmax of the logits, ``c`` the factor of the
aggregate and ``g`` the gradient of the mix::

    da_i = c (g . s_i)                    dl_i = a_i (da_i - sum_j a_j da_j)
    ds_i = c a_i g + dl_i (r_i w - r_i^2 l_i s_i / D)
    dw   = sum over tokens and i of dl_i r_i s_i,    dquery = dw * gain,    dgain = dw * query

Shapes below: N sources, D channels, ``tokens`` a source's shape without its channel dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnres_compile.errors import InputError
from attnres_compile.kernels import plain_mix
from attnres_compile.kernels.implementations import without_autocast
from attnres_compile.kernels.plain_mix import effective_query, from_the_end
from attnres_compile.kernels.reference import Aggregate, arithmetic_dtype


def mix(
    sources: Sequence[Tensor],
    query: Tensor,
    gain: Tensor | None,
    *,
    eps: float,
    aggregate: Aggregate,
    dim: int = -1,
) -> Tensor:
    """``reference.mix`` as one operator: the same arguments, result and gradients.

    Raises:
        InputError: when the sources differ in shape, dtype or device, or do not fit the query.
        NotImplementedError: under forward-mode derivatives and the transforms of ``torch.func``.

    Example:
        >>> sources = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]])]
        >>> mix(sources, torch.zeros(2), None, eps=1e-6, aggregate="sum")
        tensor([[4., 1.]])
    """
    mixed: Tensor
    mixed, _, _ = torch.ops.attnres.mix(list(sources), query, gain, eps, aggregate == "sum", dim)
    return mixed


def _mix_eagerly(
    sources: Sequence[Tensor],
    query: Tensor,
    gain: Tensor | None,
    eps: float,
    count: bool,
    dim: int,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    check_arguments(sources, query, gain, dim)
    with without_autocast(query):
        if _is_for_cpp(sources[0], dim, kernels):
            return _mix_in_cpp(sources, query, gain, eps, count)
        return plain_mix.mix(sources, query, gain, eps, count, dim)


def _mix_in_cpp(
    sources: Sequence[Tensor], query: Tensor, gain: Tensor | None, eps: float, count: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from attnres_compile.kernels import cpp_phases

    weight = effective_query(query, gain, arithmetic_dtype(sources[0].dtype))
    factor = float(len(sources)) if count else 1.0
    alone = (factor, "none", None, None, 0.0, None, True, -1)  # no norm, channels last
    _, mixed, _, saved = cpp_phases.phase2(None, None, sources, (), weight, eps, *alone)
    number = len(sources)
    return _laid_out(mixed, sources[0]), saved[:number].clone(), saved[number:].clone()


def _laid_out(result: Tensor, like: Tensor) -> Tensor:
    """In the layout that tracing was promised: that of the source."""
    return result if like.is_contiguous() else torch.empty_like(like).copy_(result)


def _is_for_cpp(source: Tensor, dim: int, kernels: str) -> bool:
    if kernels != "auto" or source.device.type != "cpu" or from_the_end(dim, source) != -1:
        return False
    from attnres_compile.kernels import cpp_library

    return cpp_library.is_available(source.dtype)


def _mix_fake(
    sources: Sequence[Tensor],
    query: Tensor,
    gain: Tensor | None,
    eps: float,
    count: bool,
    dim: int,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    check_arguments(sources, query, gain, dim)
    first = sources[0]
    tokens = list(first.shape)
    del tokens[dim]
    logits = first.new_empty((len(sources), *tokens), dtype=arithmetic_dtype(first.dtype))
    return torch.empty_like(first), logits, torch.empty_like(logits)


@torch.library.custom_op(
    "attnres::mix_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor[] sources, Tensor weight, Tensor logits, Tensor inverse_rms,"
        " bool count, int dim, int[] wanted, bool wants_weight, str kernels='auto') -> Tensor[]"
    ),
)
def _mix_backward(
    grad: Tensor,
    sources: Sequence[Tensor],
    weight: Tensor,
    logits: Tensor,
    inverse_rms: Tensor,
    count: bool,
    dim: int,
    wanted: Sequence[int],
    wants_weight: bool,
    kernels: str = "auto",
) -> list[Tensor]:
    """The gradients of the sources ``wanted`` and then, if ``wants_weight``, that of ``weight``.

    ``weight`` is [D], the query times the gain, in the arithmetic dtype, and so is its gradient.
    """
    with without_autocast(grad):
        if _is_for_cpp(grad, dim, kernels):
            from attnres_compile.kernels import cpp_phases

            saved = torch.cat([logits, inverse_rms])
            factor = float(len(sources)) if count else 1.0
            of_mix = (None, grad, None, None, None, sources, None, weight, factor, "none", None)
            which = (False, wanted, wants_weight, False, False)
            grads = cpp_phases.phase2_backward(*of_mix, saved, -1, *which)
            laid_out = [_laid_out(grads[k], sources[i]) for k, i in enumerate(wanted)]
            return [*laid_out, *grads[len(wanted) :]]
        return plain_mix.mix_backward(
            grad, sources, weight, logits, inverse_rms, count, dim, wanted, wants_weight
        )


@_mix_backward.register_fake
def _mix_backward_fake(
    grad: Tensor,
    sources: Sequence[Tensor],
    weight: Tensor,
    logits: Tensor,
    inverse_rms: Tensor,
    count: bool,
    dim: int,
    wanted: Sequence[int],
    wants_weight: bool,
    kernels: str = "auto",
) -> list[Tensor]:
    grads = [torch.empty_like(sources[i]) for i in wanted]
    return [*grads, torch.empty_like(weight)] if wants_weight else grads


NO_TRANSFORMS = (
    "attnres::mix has derivatives in reverse mode only, and no rules for torch.func; under "
    "forward_ad, vmap, grad or jvp call attnres_compile.kernels.reference.mix."
)


def _mix_differentiably(
    keys: Any,
    sources: Sequence[Tensor],
    query: Tensor,
    gain: Tensor | None,
    eps: float,
    count: bool,
    dim: int,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (query, gain, eps, count, dim, kernels)
    tensors = [t for t in (*sources, query, gain) if t is not None]
    _refuse_transforms(tensors)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        mixed: tuple[Tensor, Tensor, Tensor] = _Mix.apply(keys, *arguments, *sources)
        return mixed
    return _below_autograd(keys, sources, *arguments)


def _refuse_transforms(tensors: Sequence[Tensor]) -> None:
    """Raise where PyTorch would go on: a tangent would be lost without a word."""
    functional = torch._C._are_functorch_transforms_active()
    if functional or (forward_ad._current_level >= 0 and any(map(_has_tangent, tensors))):
        raise NotImplementedError(NO_TRANSFORMS)


def _vmap(*_: object) -> None:
    raise NotImplementedError(NO_TRANSFORMS)


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def _below_autograd(keys: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What the dispatcher comes to after its autograd keys: an implementation, or a tracer."""
    with torch._C._AutoDispatchBelowAutograd():
        below = keys & torch._C._after_autograd_keyset
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.attnres.mix.default.redispatch(
            below, *arguments
        )
        return result


class _Mix(torch.autograd.Function):
    """The gradient, with the sources as arguments of their own.

    What ``register_autograd`` makes of an operator with a list of tensors takes the arguments apart
    and together again in Python for every call: 0.12 of the 0.55 ms that a mix of small sources and
    its backward pass took, and 0.4 ms between matrices, which leave nothing of it in the caches.
    """

    @staticmethod
    def forward(
        ctx: Any,
        keys: Any,
        query: Tensor,
        gain: Tensor | None,
        eps: float,
        count: bool,
        dim: int,
        kernels: str,
        *sources: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        result = _below_autograd(keys, sources, query, gain, eps, count, dim, kernels)
        _, logits, inverse_rms = result
        ctx.count, ctx.dim, ctx.kernels = count, dim, kernels
        ctx.mark_non_differentiable(logits, inverse_rms)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, gain, logits, inverse_rms, *sources)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        _, needs_query, needs_gain, _, _, _, _, *needs_sources = ctx.needs_input_grad
        query, gain, logits, inverse_rms, *sources = ctx.saved_tensors
        grad_sources: list[Tensor | None] = [None] * len(sources)
        if grad is None:
            return (*[None] * 7, *grad_sources)
        wanted = [i for i, needed in enumerate(needs_sources) if needed]
        grads = torch.ops.attnres.mix_backward(
            grad,
            sources,
            effective_query(query, gain, logits.dtype),
            logits,
            inverse_rms,
            ctx.count,
            ctx.dim,
            wanted,
            needs_query or needs_gain,
            ctx.kernels,
        )
        for i, grad_source in zip(wanted, grads, strict=False):
            grad_sources[i] = grad_source
        grad_query = effective_query(grads[-1], gain, logits.dtype) if needs_query else None
        grad_gain = grads[-1] * query.to(logits.dtype) if needs_gain else None
        vectors = (_cast(grad_query, query), _cast(grad_gain, gain))
        return (None, *vectors, None, None, None, None, *grad_sources)


def _registered() -> Any:
    """The mix; in a module that is imported again, in the place of the one before."""
    namespace: Any = torch.ops.attnres
    before = getattr(namespace, "_library_of_mix", None)
    if before is not None:
        before._destroy()
    library: Any = torch.library.Library("attnres", "FRAGMENT")  # type: ignore[no-untyped-call]
    namespace._library_of_mix = library
    library.define(
        "mix(Tensor[] sources, Tensor query, Tensor? gain, float eps, bool count, int dim,"
        " str kernels='auto') -> (Tensor mixed, Tensor logits, Tensor inverse_rms)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    library.impl("mix", _mix_eagerly, "CompositeExplicitAutograd")
    library.impl("mix", _mix_differentiably, "Autograd", with_keyset=True)
    torch.library.register_fake("attnres::mix", _mix_fake, lib=library)
    torch.library.register_vmap("attnres::mix", _vmap, lib=library)
    return library


_LIBRARY = _registered()  # as long as it lives there is the operator


def _second_backward(*_: object) -> None:
    raise NotImplementedError(
        "attnres::mix has first derivatives only; for higher ones call "
        "attnres_compile.kernels.reference.mix."
    )


_mix_backward.register_autograd(_second_backward)


def check_arguments(
    sources: Sequence[Tensor], query: Tensor, gain: Tensor | None, dim: int
) -> None:
    """Raise InputError unless the arguments fit together; the message says what to change."""
    if not sources:
        raise InputError("there are no sources to mix; pass at least one tensor.")
    first = sources[0]
    if not first.is_floating_point():
        raise InputError(f"sources must be of a floating dtype, not {first.dtype}; cast them.")
    if not -first.ndim <= dim < first.ndim:
        raise InputError(
            f"dim={dim} is not a dimension of sources of shape {tuple(first.shape)}; pass the "
            "position of their channels, -1 for tokens and 1 for images."
        )
    for i, source in enumerate(sources):
        if source.shape != first.shape:
            raise InputError(
                f"source {i} has shape {tuple(source.shape)} and source 0 has shape "
                f"{tuple(first.shape)}; expand them to one shape first."
            )
        if source.dtype != first.dtype:
            raise InputError(
                f"source {i} is {source.dtype} and source 0 is {first.dtype}; cast them to one "
                "dtype first."
            )
        if source.device != first.device:
            raise InputError(
                f"source {i} is on {source.device} and source 0 is on {first.device}; move them "
                "to one device first."
            )
    _check_vector("query", query, first, dim)
    if gain is not None:
        _check_vector("gain", gain, first, dim)


def _check_vector(name: str, vector: Tensor, source: Tensor, dim: int) -> None:
    if vector.shape != (source.shape[dim],):
        raise InputError(
            f"the {name} has shape {tuple(vector.shape)}, but dimension {dim} of the sources, of "
            f"shape {tuple(source.shape)}, asks for ({source.shape[dim]},); pass one number per "
            "channel, or another dim."
        )
    if not vector.is_floating_point():
        raise InputError(f"the {name} must be of a floating dtype, not {vector.dtype}; cast it.")
    if vector.device != source.device:
        raise InputError(
            f"the {name} is on {vector.device} and the sources are on {source.device}; move it."
        )


def _cast(grad: Tensor | None, like: Tensor) -> Tensor | None:
    return None if grad is None else grad.to(like.dtype)
