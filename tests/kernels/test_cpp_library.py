"""The operators of the C++ library by themselves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from attnres_compile.kernels import cpp_library
from attnres_compile.kernels.cpp_library import operator


def test_operators_write_what_their_schema_says() -> None:
    source, queries = torch.randn(3, 5, 16), torch.randn(2, 16)
    logits, inverse_rms = torch.full((2, 3, 5), torch.nan), torch.full((3, 5), torch.nan)
    complete = operator("complete", torch.float32)
    complete(source, None, None, queries, 2, 1e-6, None, logits, inverse_rms)
    expected = (source.square().mean(-1) + 1e-6).rsqrt()
    torch.testing.assert_close(inverse_rms, expected)
    torch.testing.assert_close(logits, torch.einsum("jd,...d->j...", queries, source) * expected)


def test_their_fakes_compute_nothing() -> None:
    with FakeTensorMode():
        source, queries, logits = torch.empty(5, 16), torch.empty(2, 16), torch.empty(2, 5)
        complete = operator("complete", torch.float32)
        complete(source, None, None, queries, 2, 1e-6, None, logits, torch.empty(5))


@pytest.mark.parametrize(
    "source",
    [torch.randn(16, 5).t(), torch.randn(5, 16).double(), torch.ones(5, 16, dtype=torch.int32)],
    ids=["strides", "float64", "int32"],
)
def test_rows_that_lie_apart_or_are_of_another_dtype_are_an_error(source: torch.Tensor) -> None:
    complete, queries = operator("complete", torch.float32), torch.randn(2, 16)
    logits, inverse_rms = torch.empty(2, 5), torch.empty(5)
    with pytest.raises(RuntimeError, match="not contiguous, or not of the dtype of the stream"):
        complete(source, None, None, queries, 2, 1e-6, None, logits, inverse_rms)


def test_a_stream_of_no_tokens() -> None:
    source, queries, logits = torch.empty(0, 16), torch.randn(2, 16), torch.empty(2, 0)
    complete = operator("complete", torch.float32)
    complete(source, None, None, queries, 2, 1e-6, None, logits, torch.empty(0))


SOURCE = Path(cpp_library.__file__).parent / "templates" / "phases.cpp"


KINDS = {  # of arguments: how they are written in C++, in front of the name
    "Tensor": (r"(const )?(Element|Real|void) \*",),
    "Optional[Tensor]": (r"(const )?(Element|Real|void) \*",),
    "List[Tensor]": (r"(const )?(Element|Real) \*\*",),
    "List[int]": (r"const int64_t \*", r"int64_t "),
    "int": (r"int64_t ",),
    "bool": (r"int64_t ",),
    "float": (r"double ",),
}


@pytest.mark.parametrize("name", cpp_library.NAMES)
def test_a_schema_has_the_arguments_of_the_function(name: str) -> None:
    found = re.search(rf'extern "C" void {name}\((.*?)\) \{{', SOURCE.read_text(), re.DOTALL)
    assert found is not None
    written = [" ".join(each.split()) for each in found[1].split(",")]
    expected = []
    for argument in getattr(torch.ops.attnres, f"cpp_{name}").float32._schema.arguments:
        first, *length = KINDS[str(argument.type)]
        expected += [first + argument.name, *(kind + r"\w+" for kind in length)]
    expected += ["int64_t tokens", "int64_t width", "int64_t threads"]
    assert len(written) == len(expected)
    for parameter, pattern in zip(written, expected, strict=True):
        assert re.fullmatch(pattern, parameter), f"{parameter} is not {pattern}"
