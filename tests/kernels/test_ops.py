"""attnres::mix against its specification: values, gradients and refusals."""

import doctest
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import attnres_compile.functional
from attnres_compile.errors import BackendError, InputError
from attnres_compile.functional import attnres
from attnres_compile.kernels import cpp_library, cpp_phases, ops, plain_mix, reference
from mix_cases import assert_case_matches, make_case
from tolerances import TOLERANCE, assert_matches


def decomposed(
    sources: Sequence[Tensor], query: Tensor, gain: Tensor | None, **options: object
) -> Tensor:
    """The decomposition under the signature of ``ops.mix``, differentiated by PyTorch."""
    count = options["aggregate"] == "sum"
    return plain_mix.decomposition(sources, query, gain, options["eps"], count, options["dim"])[0]


def in_pytorch(
    sources: Sequence[Tensor],
    query: Tensor,
    gain: Tensor | None,
    *,
    eps: float,
    aggregate: str,
    dim: int = -1,
) -> Tensor:
    """The operator in plain PyTorch, also where there is a C++ library."""
    arguments = (list(sources), query, gain, eps, aggregate == "sum", dim)
    return torch.ops.attnres.mix(*arguments, kernels="reference")[0]


OPERATORS = pytest.mark.parametrize(
    "mix", [ops.mix, in_pytorch, decomposed], ids=["op", "in PyTorch", "decomposed"]
)


@pytest.mark.parametrize("mix", [ops.mix, in_pytorch, decomposed, attnres])
@pytest.mark.parametrize("width", [1, 48, 64, 96, 1000])
@pytest.mark.parametrize("num_sources", [*range(1, 10), 33])
def test_widths_and_numbers_of_sources(
    num_sources: int, width: int, mix: Callable[..., Tensor]
) -> None:
    assert_case_matches(make_case(num_sources, (2, 3, width)), mix)


@OPERATORS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("aggregate", ["sum", "mean"])
@pytest.mark.parametrize("with_gain", [True, False], ids=["gain", "no-gain"])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((2, 3, 48), -1), ((2, 48, 3, 5), 1), ((2, 48, 3, 5), -3), ((48,), 0), ((0, 48), -1)],
    ids=["tokens", "images", "images-from-the-end", "one-token", "no-token"],
)
def test_layouts_dtypes_and_modes(
    shape: tuple[int, ...],
    dim: int,
    with_gain: bool,
    aggregate: str,
    dtype: torch.dtype,
    mix: Callable[..., Tensor],
) -> None:
    options = {"dim": dim, "dtype": dtype, "aggregate": aggregate, "with_gain": with_gain}
    assert_case_matches(make_case(4, shape, **options), mix)


def test_where_one_source_has_nearly_all_the_weight() -> None:
    """The gradient of the query is off by 1e-4 if autograd forms it."""
    case = make_case(3, (1, 64), with_gain=False)
    sharp = replace(case, query=(case.query.detach() * 8).requires_grad_())
    assert_case_matches(sharp, in_pytorch)


@OPERATORS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounds_once_at_the_end(dtype: torch.dtype, mix: Callable[..., Tensor]) -> None:
    case = make_case(33, (8, 96), dtype=dtype)
    expected = case.expected()
    for name, result in case.run(mix).items():
        # Float32 errors move a value across the middle between two neighbours now and then.
        assert (result == expected[name]).double().mean() > 0.95, name


@given(
    layouts=st.lists(
        st.sampled_from(["dense", "transposed", "strided", "expanded"]), min_size=1, max_size=4
    ),
    shape=st.lists(st.integers(2, 4), min_size=2, max_size=4),
    data=st.data(),
)
def test_any_mix_of_views(layouts: list[str], shape: list[int], data: st.DataObject) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1), label="dim")
    case = make_case(len(layouts), shape, dim=dim, dtype=torch.float64)
    views = [lay_out(case.sources[i], layout, dim) for i, layout in enumerate(layouts)]
    assert_case_matches(replace(case, sources=tuple(views)), ops.mix)


def lay_out(source: Tensor, layout: str, dim: int) -> Tensor:
    """A view of ``source``'s shape with other strides; "expanded" repeats the first token."""
    if layout == "transposed":
        return source.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        return torch.stack([source, source], dim=-1)[..., 0]
    if layout == "expanded":
        token_dim = 1 if dim % source.ndim == 0 else 0
        return source.narrow(token_dim, 0, 1).expand_as(source)
    return source


@pytest.mark.parametrize("mix", [ops.mix, in_pytorch])
@pytest.mark.parametrize("with_gain", [True, False], ids=["gain", "no-gain"])
@pytest.mark.parametrize(("shape", "dim"), [((2, 5), -1), ((2, 5, 2), 1)])
def test_gradcheck(
    shape: tuple[int, ...], dim: int, with_gain: bool, mix: Callable[..., Tensor]
) -> None:
    case = make_case(3, shape, dim=dim, dtype=torch.float64, with_gain=with_gain)

    def function(query: Tensor, gain: Tensor | None, *sources: Tensor) -> Tensor:
        return mix(sources, query, gain, eps=1e-6, aggregate="sum", dim=dim)

    assert torch.autograd.gradcheck(function, (case.query, case.gain, *case.sources))


def library_calls(mix: Callable[..., Tensor], shape: tuple[int, ...], **options: Any) -> list[str]:
    """The functions of the C++ library that a mix and its gradients call."""
    case, names = make_case(3, shape, **options), []

    def recorded(name: str, dtype: torch.dtype) -> Callable[..., None]:
        names.append(name)
        return cpp_library.operator(name, dtype)

    with mock.patch.object(cpp_phases, "operator", recorded):
        case.run(mix)
    return names


def test_rows_on_a_cpu_are_mixed_by_the_library() -> None:
    calls = library_calls(ops.mix, (2, 3, 48))
    assert calls == ["phase2", "phase2_backward"]
    assert not library_calls(in_pytorch, (2, 3, 48))
    assert not library_calls(ops.mix, (2, 48, 3), dim=1)
    assert not library_calls(ops.mix, (2, 3, 48), dtype=torch.float16)


NO_LIBRARY = [
    InvalidCxxCompiler(),
    CppCompileError(["g++"], "error: unrecognised flag"),
    OSError("failed to map segment"),
]


@pytest.fixture(params=NO_LIBRARY, ids=lambda error: type(error).__name__)
def missing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """There is no library; the name of the error that says so."""
    monkeypatch.setattr(cpp_library, "_library", mock.Mock(side_effect=request.param))
    cpp_library.is_available.cache_clear()
    yield type(request.param).__name__
    cpp_library.is_available.cache_clear()


def test_without_a_library_it_is_told_and_plain_pytorch_mixes(missing: str) -> None:
    with pytest.warns(UserWarning, match=f"could not be built and loaded .{missing}"):
        assert not library_calls(ops.mix, (2, 3, 48))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is told once
        assert_case_matches(make_case(3, (2, 3, 48)), ops.mix)


def test_without_a_library_nothing_is_compiled(missing: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(attnres, backend="attnres")
    x = torch.randn(2, 3, 48)
    with pytest.raises(Exception, match=f"could not be built and loaded .{missing}") as caught:
        compiled([x, 2 * x], torch.zeros(48))
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), BackendError)


class BackwardCalls(TorchDispatchMode):
    """Records which sources, and whether the weight, each call of mix_backward is to derive."""

    def __init__(self) -> None:
        super().__init__()
        self.asked_for: list[tuple[list[int], bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.attnres.mix_backward.default:
            self.asked_for.append(args[-2:])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "frozen",
    [
        ["query"],
        ["gain"],
        ["query", "gain"],
        ["sources[1]"],
        ["sources[0]", "sources[1]", "sources[2]"],
    ],
    ids=" ".join,
)
def test_gradients_of_what_needs_them(frozen: list[str]) -> None:
    case = make_case(3, (2, 48))
    expected = case.expected()
    for name in frozen:
        case.tensors()[name].requires_grad_(False)
    mixed = ops.mix(case.sources, case.query, case.gain, eps=1e-6, aggregate="sum")
    with BackwardCalls() as calls:
        mixed.backward(case.grad)
    wanted = [i for i in range(3) if f"sources[{i}]" not in frozen]
    assert calls.asked_for == [(wanted, not {"query", "gain"} <= set(frozen))]
    for name, tensor in case.tensors().items():
        assert (tensor.grad is None) == (name in frozen), name
        if tensor.grad is not None:
            assert_matches(tensor.grad, expected[name], name=name)


def test_zero_query_adds_up_or_averages() -> None:
    case = make_case(9, (2, 3, 48))
    zero = torch.zeros(48)
    total = ops.mix(case.sources, zero, case.gain, eps=1e-6, aggregate="sum")
    assert_matches(total, torch.stack(case.sources).sum(0), name="sum")
    mean = ops.mix(case.sources, zero, case.gain, eps=1e-6, aggregate="mean")
    assert_matches(mean, torch.stack(case.sources).mean(0), name="mean")


def test_parameters_may_be_wider_than_the_sources() -> None:
    case = make_case(3, (4, 48), dtype=torch.bfloat16)
    query, gain = (vector.detach().float().requires_grad_() for vector in (case.query, case.gain))
    assert_case_matches(replace(case, query=query, gain=gain), ops.mix)


def test_one_tensor_may_be_several_sources() -> None:
    case = make_case(2, (4, 48))
    first, second = case.sources
    options = {"eps": 1e-6, "aggregate": "sum"}
    twice = ops.mix([first, second, first], case.query, case.gain, **options)
    apart = ops.mix([first, second, first.clone()], case.query, case.gain, **options)
    grads = [torch.autograd.grad(mixed, case.sources, case.grad) for mixed in (twice, apart)]
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_autocast_changes_nothing() -> None:
    case = make_case(3, (4, 48))
    plain = case.run(ops.mix)
    with torch.autocast("cpu", torch.bfloat16):
        cast = case.run(ops.mix)
    assert all(torch.equal(plain[name], cast[name]) for name in plain)


def test_activation_checkpointing() -> None:
    def checkpointed(*args: object, **options: object) -> Tensor:
        return checkpoint(ops.mix, *args, use_reentrant=False, **options)

    assert_case_matches(make_case(3, (4, 48)), checkpointed)


def test_a_source_changed_before_backward_is_an_error() -> None:
    case = make_case(3, (4, 48))
    mixed = ops.mix(case.sources, case.query, case.gain, eps=1e-6, aggregate="sum")
    with torch.no_grad():
        case.sources[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        mixed.backward(case.grad)


class DropGradient(torch.autograd.Function):
    """The identity, whose backward pass gives no gradient at all."""

    @staticmethod
    def forward(ctx: object, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> None:
        return None


def test_no_gradient_arrives() -> None:
    case = make_case(3, (4, 48))
    mixed = ops.mix(case.sources, case.query, case.gain, eps=1e-6, aggregate="sum")
    DropGradient.apply(mixed).sum().backward()
    assert all(tensor.grad is None for tensor in case.tensors().values())


def test_statistics_have_no_gradient() -> None:
    case = make_case(3, (4, 48))
    mixed, logits, inverse_rms = torch.ops.attnres.mix(
        list(case.sources), case.query, case.gain, 1e-6, True, -1
    )
    assert mixed.requires_grad
    assert logits.shape == inverse_rms.shape == (3, 4)
    assert not logits.requires_grad
    assert not inverse_rms.requires_grad
    rms = torch.stack(case.sources).square().mean(-1).sqrt()
    assert_matches(1 / inverse_rms, rms.detach(), name="rms")


def test_second_derivatives_are_refused() -> None:
    case = make_case(3, (4, 48))
    mixed = ops.mix(case.sources, case.query, case.gain, eps=1e-6, aggregate="sum")
    (grad,) = torch.autograd.grad(mixed.square().sum(), case.query, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"first derivatives only.*reference\.mix"):
        grad.sum().backward()


def tangent_of_dual(function: Callable[[Tensor], Tensor], query: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        made = function(forward_ad.make_dual(query, torch.ones_like(query)))
        tangent: Tensor | None = forward_ad.unpack_dual(made).tangent
        return tangent


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "dual numbers": tangent_of_dual,
    "jvp": lambda function, query: torch.func.jvp(function, (query,), (torch.ones_like(query),)),
    "grad": lambda function, query: torch.func.grad(function)(query),
    "vmap": lambda function, query: torch.func.vmap(function)(query.expand(2, -1)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("requires_grad", [True, False])
def test_no_tangent_is_lost_without_a_word(transform: str, requires_grad: bool) -> None:
    case = make_case(3, (4, 48))
    sources = [source.detach() for source in case.sources]
    query = case.query.detach().requires_grad_(requires_grad)

    def by(mix: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda query: mix(sources, query, None, eps=1e-6, aggregate="sum").square().sum()

    with pytest.raises(NotImplementedError, match=r"reverse mode only.*reference\.mix"):
        TRANSFORMS[transform](by(ops.mix), query)
    assert TRANSFORMS[transform](by(reference.mix), query) is not None
    with forward_ad.dual_level():  # nothing is lost where nothing has a tangent
        assert by(ops.mix)(query).isfinite()


TOKENS = torch.zeros(2, 3, 4)
BAD_ARGUMENTS = {
    "no sources to mix; pass at least one tensor": {"sources": []},
    r"one tensor of shape \(2, 3, 4\); pass a list .* list\(sources.unbind\(0\)\)": {
        "sources": TOKENS
    },
    "source 1 is a float; pass a tensor": {"sources": [TOKENS, 1.0]},
    r"source 1 has shape \(2, 1, 4\) and source 0 has shape \(2, 3, 4\); expand": {
        "sources": [TOKENS, TOKENS[:, :1]]
    },
    "source 1 is torch.float64 and source 0 is torch.float32; cast": {
        "sources": [TOKENS, TOKENS.double()]
    },
    "source 1 is on meta and source 0 is on cpu; move": {"sources": [TOKENS, TOKENS.to("meta")]},
    "sources must be of a floating dtype, not torch.int64": {"sources": [TOKENS.long()]},
    r"dim=3 is not a dimension of sources of shape \(2, 3, 4\)": {"dim": 3},
    r"query has shape \(4,\), but dimension 1 of the sources, .* asks for \(3,\)": {"dim": 1},
    r"query has shape \(4, 1\)": {"query": torch.zeros(4, 1)},
    "the query is a NoneType; pass a tensor": {"query": None},
    "the query must be of a floating dtype, not torch.int64": {"query": torch.zeros(4).long()},
    "the query is on meta and the sources are on cpu": {"query": torch.zeros(4, device="meta")},
    r"gain has shape \(5,\)": {"gain": torch.zeros(5)},
    "the gain is a float; pass a tensor": {"gain": 1.0},
    "aggregate must be 'sum' or 'mean', not 'max'": {"aggregate": "max"},
    "eps must be positive, not 0": {"eps": 0},
}


@pytest.mark.parametrize(("message", "change"), BAD_ARGUMENTS.items(), ids=list(BAD_ARGUMENTS))
def test_bad_arguments(message: str, change: dict[str, object]) -> None:
    arguments = {"sources": [TOKENS, TOKENS], "query": torch.zeros(4), **change}
    with pytest.raises(InputError, match=message):
        attnres(**arguments)


@pytest.mark.parametrize("module", [ops, attnres_compile.functional], ids=lambda m: m.__name__)
def test_docstring_examples(module: object) -> None:
    failures, examples = doctest.testmod(module)
    assert failures == 0
    assert examples > 0
