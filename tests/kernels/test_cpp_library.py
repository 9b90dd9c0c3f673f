"""The operators of the C++ library by themselves."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from attnres_compile.errors import BackendError
from attnres_compile.kernels.cpp_library import OPERATORS


def test_operators_write_what_their_schema_says() -> None:
    source, queries = torch.randn(3, 5, 16), torch.randn(2, 16)
    logits, inverse_rms = torch.full((2, 3, 5), torch.nan), torch.full((3, 5), torch.nan)
    OPERATORS["complete"](source, None, None, queries, 2, 1e-6, None, logits, inverse_rms)
    expected = (source.square().mean(-1) + 1e-6).rsqrt()
    torch.testing.assert_close(inverse_rms, expected)
    torch.testing.assert_close(logits, torch.einsum("jd,...d->j...", queries, source) * expected)


def test_their_fakes_compute_nothing() -> None:
    with FakeTensorMode():
        source, queries, logits = torch.empty(5, 16), torch.empty(2, 16), torch.empty(2, 5)
        OPERATORS["complete"](source, None, None, queries, 2, 1e-6, None, logits, torch.empty(5))


def test_rows_that_lie_apart_are_an_error() -> None:
    source, queries = torch.randn(16, 5).t(), torch.randn(2, 16)
    with pytest.raises(BackendError, match="strides \\(1, 5\\), which is not contiguous"):
        OPERATORS["complete"](
            source, None, None, queries, 2, 1e-6, None, torch.empty(2, 5), torch.empty(5)
        )
