"""The operators of the C++ library by themselves."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from attnres_compile.errors import BackendError
from attnres_compile.kernels import cpp_library
from attnres_compile.kernels.cpp_library import operator


def call(source: torch.Tensor, **given: torch.Tensor | None) -> None:
    """A site of one source, without a norm: room for results is made, but for what is given."""
    query, rows = given.get("query", torch.ones(16)), source.shape[:-1]
    mixed = given.get("mixed", torch.empty(source.shape))
    saved = given.get("saved", torch.empty(2, *rows))
    site = (query, given.get("gain"), 1e-6, 2.0, 0, None, None, 0.0, False)
    operator("phase2", torch.float32)([source], 1, *[None] * 3, *site, None, mixed, None, saved)


def test_operators_write_what_their_schema_says() -> None:
    source = torch.randn(3, 5, 16)
    mixed, saved = torch.full((3, 5, 16), torch.nan), torch.full((2, 3, 5), torch.nan)
    call(source, mixed=mixed, saved=saved)
    inverse_rms = (source.square().mean(-1) + 1e-6).rsqrt()
    torch.testing.assert_close(mixed, 2 * source)
    torch.testing.assert_close(saved, torch.stack([source.sum(-1) * inverse_rms, inverse_rms]))


def test_a_query_may_come_as_two_factors() -> None:
    source, query, gain = torch.randn(7, 16), torch.randn(16), torch.randn(16)
    of_factors, of_product = torch.empty(2, 7), torch.empty(2, 7)
    call(source, query=query, gain=gain, saved=of_factors)
    call(source, query=query * gain, saved=of_product)
    assert torch.equal(of_factors, of_product)
    call(source, query=query, saved=of_product)
    assert not torch.equal(of_factors, of_product)


def test_statistics_that_nobody_wants_are_not_written() -> None:
    source = torch.randn(37, 16)
    mixed, alone = torch.empty(37, 16), torch.empty(37, 16)
    call(source, mixed=mixed)
    call(source, mixed=alone, saved=None)
    assert torch.equal(mixed, alone)


def test_their_fakes_compute_nothing() -> None:
    with FakeTensorMode():
        call(torch.empty(5, 16))


@pytest.mark.parametrize(
    "source",
    [torch.randn(16, 5).t(), torch.randn(5, 16).double(), torch.ones(5, 16, dtype=torch.int32)],
    ids=["strides", "float64", "int32"],
)
def test_rows_that_lie_apart_or_are_of_another_dtype_are_an_error(source: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="not contiguous, or not of the dtype of the stream"):
        call(source)


def arguments_of_a_site(source: torch.Tensor, mixed: torch.Tensor) -> list[Any]:
    query = torch.ones(16)
    site = (query, None, 1e-6, 2.0, 0, None, None, 0.0, False)
    return [[source], 1, *[None] * 3, *site, None, mixed, None, None]


def test_functions_do_what_the_operators_do() -> None:
    """The same, for rows in whatever shape the sizes say."""
    source, by_operator, by_function = torch.randn(3, 5, 16), torch.empty(15, 16), torch.empty(240)
    operator("phase2", torch.float32)(*arguments_of_a_site(source, by_operator))
    cpp_library.calls("float32").phase2(*arguments_of_a_site(source, by_function), 15, 16)
    assert torch.equal(by_operator.flatten(), by_function)
    by_function.zero_()
    cpp_library.calls("float32").phase2(*arguments_of_a_site(source, by_function), 14, 16)
    assert torch.equal(by_function[-16:], torch.zeros(16))


@pytest.mark.parametrize(
    ("place", "wrong", "error", "message"),
    [
        (0, torch.ones(1, 16), RuntimeError, "not handed a list"),
        (0, [[1.0] * 16], RuntimeError, "non-tensor"),
        (1, "1", TypeError, "integer"),
        (7, "1e-6", TypeError, "real number"),
        (18, [], RuntimeError, "wrong number of arguments"),
    ],
)
def test_functions_raise_for_what_is_no_argument(
    place: int, wrong: Any, error: type[Exception], message: str
) -> None:
    mixed = torch.full((1, 16), 7.0)
    arguments = [*arguments_of_a_site(torch.randn(1, 16), mixed), 1, 16]
    arguments[place : place + 1] = [wrong, wrong] if place == 18 else [wrong]
    with pytest.raises(error, match=message):
        cpp_library.calls("float32").phase2(*arguments)
    assert bool((mixed == 7).all())


def test_a_library_without_headers_of_python_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_library, "_library", lambda dtype: object())
    with pytest.raises(BackendError, match="python3-dev"):
        cpp_library.calls.__wrapped__("float32")


def test_a_stream_of_no_tokens() -> None:
    call(torch.empty(0, 16))


MAPPED = """
import ctypes, torch
from attnres_compile.kernels import cpp_library

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

library = ctypes.CDLL("libc.so.6")
library.mallinfo2.restype = Info

kept = []  # to free one would do what is to be tested

def mapped():
    before = library.mallinfo2().hblks
    kept.append(torch.empty(16 << 20, dtype=torch.uint8))
    return library.mallinfo2().hblks - before

print(mapped())
cpp_library.prepare(torch.float32)
print(mapped())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what glibc does with freed memory")
def test_memory_that_a_step_frees_stays_for_the_next() -> None:
    """A large block is asked of the system before, and is part of the kept memory after."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    run = subprocess.run(
        [sys.executable, "-P", "-c", MAPPED],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == ["1", "0"]


TEMPLATES = Path(cpp_library.__file__).parent / "templates"


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
    source = (TEMPLATES / f"{name.removesuffix('_backward')}.cpp").read_text()
    found = re.search(rf'extern "C" void {name}\((.*?)\) \{{', source, re.DOTALL)
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
