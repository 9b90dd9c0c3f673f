"""The C++ library for CPUs, compiled on first use, and its functions as operators that write.

``templates/phases.cpp`` holds the loops over tokens, ``templates/rows.h`` what they do with a row.
A function of it is the operator ``attnres::cpp_<name>``, which returns nothing and writes to the
tensors that its schema marks. So whoever calls it says where results go, and in a compiled graph
Inductor plans that memory with all the rest. The functions have their arguments in the order of the
schemas, then the sizes.
"""

from __future__ import annotations

import ctypes
import itertools
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnres_compile.errors import BackendError
from attnres_compile.kernels.reference import arithmetic_dtype

_SOURCES = [Path(__file__).parent / "templates" / name for name in ("rows.h", "phases.cpp")]
# Inductor vectorises by itself and has the compiler not do it; here the compiler shall.
_FLAGS = ("-ftree-loop-vectorize", "-ffp-contract=fast", "-fno-math-errno")
# Rows are contiguous, of the dtype of the stream, and the first tensor is one: its shape is
# [*tokens, width], and its dtype says which library it is. What is added to the partial sum may
# come without the bias of its linear layer, an argument then (passes/absorb_biases.py).
_SCHEMAS = {
    "complete": (
        "Tensor first, Tensor? second, Tensor? bias, Tensor queries, int sites, float eps,"
        " Tensor(a!)? source, Tensor(b!) logits, Tensor(c!) inverse_rms"
    ),
    "complete_backward": (
        "Tensor source, Tensor? grad_source, Tensor grad_logits, Tensor queries, int sites,"
        " Tensor logits, Tensor inverse_rms, Tensor(a!)? grad, Tensor(b!)? grad_queries"
    ),
    "phase1": (
        "Tensor[] sources, Tensor[] logits, int count, int sites, Tensor(a!)[] mixes,"
        " Tensor(b!) statistics"
    ),
    "phase1_backward": (
        "Tensor[] sources, Tensor[] logits, int count, int sites, Tensor statistics,"
        " Tensor[] grad_mixes, int[] mixed, Tensor grad_statistics, Tensor[] grad_carriers,"
        " int[] arrived, Tensor(a!)[] grads, int[] wanted, Tensor(b!)? grad_logits"
    ),
    "phase2": (
        "Tensor? before, Tensor[] direct, int count, Tensor? statistics, Tensor? branch,"
        " Tensor? branch_bias, Tensor query, float eps, float factor, int norm, Tensor? weight,"
        " Tensor? bias, float norm_eps, bool wide, Tensor(a!)? partial, Tensor(b!)? mixed,"
        " Tensor(c!)? normed, Tensor(d!) saved"
    ),
    "phase2_backward": (
        "Tensor? before, Tensor[] direct, int count, Tensor? statistics, Tensor? grad_partial,"
        " Tensor? grad_mixed, Tensor? grad_normed, bool wide, Tensor query, float factor, int norm,"
        " Tensor? weight, Tensor saved, Tensor(a!)? grad_before, Tensor(b!)? grad_statistics,"
        " Tensor(c!)[] grads, int[] wanted, Tensor(d!)? grad_query, Tensor(e!)? grad_weight,"
        " Tensor(f!)? grad_bias, Tensor(g!)? grad_branch_bias"
    ),
}
_POINTER = (ctypes.c_void_p,)
_C_TYPES = {
    "Tensor": _POINTER,
    "Tensor?": _POINTER,
    "Tensor[]": _POINTER,
    "int[]": (ctypes.c_void_p, ctypes.c_int64),
    "int": (ctypes.c_int64,),
    "bool": (ctypes.c_int64,),
    "float": (ctypes.c_double,),
}


def prepare(dtype: torch.dtype) -> None:
    """Compiles the library for streams of `dtype`, so that a missing compiler shows at once."""
    _function("complete", dtype)


def _run(name: str, *arguments: Any) -> None:
    # Phase 2 has no first argument where no phase 1 is before it.
    first: Any = arguments[1] if arguments[0] is None else arguments[0]
    like: Tensor = first if isinstance(first, Tensor) else first[0]
    width = like.shape[-1]
    tokens = like.numel() // width if width else 0
    dtypes = (like.dtype, arithmetic_dtype(like.dtype))
    values: list[Any] = []
    for kind, argument in zip(_kinds(name), arguments, strict=True):
        if kind == "Tensor" or kind == "Tensor?":
            values.append(_at(argument, dtypes))
        elif kind == "Tensor[]":
            addresses = [_at(tensor, dtypes) for tensor in argument]
            values.append((ctypes.c_void_p * len(argument))(*addresses))
        elif kind == "int[]":
            values += [(ctypes.c_int64 * len(argument))(*argument), len(argument)]
        else:
            values.append(argument)
    threads = max(1, min(torch.get_num_threads(), tokens))
    _function(name, like.dtype)(*values, tokens, width, threads)


@cache
def _kinds(name: str) -> list[str]:
    """The types of a function's arguments, without the marks of what it writes to."""
    types = [argument.split()[0] for argument in _SCHEMAS[name].split(", ")]
    return [re.sub(r"\(.!\)", "", each) for each in types]


@cache
def _function(name: str, dtype: torch.dtype) -> Callable[..., None]:
    from torch._inductor.codecache import CppCodeCache

    element = str(dtype).removeprefix("torch.")
    source = "\n".join(path.read_text() for path in _SOURCES)
    library = CppCodeCache.load(f"#define FOR_{element.upper()}\n{source}", extra_flags=_FLAGS)
    function = getattr(library, name)
    function.restype = None
    types = [_C_TYPES[kind] for kind in _kinds(name)]
    function.argtypes = [*itertools.chain(*types), *3 * [ctypes.c_int64]]
    return function  # type: ignore[no-any-return]


def _at(tensor: Tensor | None, dtypes: tuple[torch.dtype, ...]) -> int | None:
    """The address of a tensor that the library can read as it is."""
    if tensor is None:
        return None
    if not tensor.is_contiguous() or tensor.dtype not in dtypes:
        raise BackendError(
            f"the C++ library was handed a tensor of {tensor.dtype} with strides "
            f"{tensor.stride()}, which is not contiguous or not of {dtypes}; this is a bug of "
            "attnres-compile."
        )
    return tensor.data_ptr()


def _defined() -> Any:
    # As long as it lives there are the operators; compiled code of another process, read from
    # Inductor's cache, calls them, so they are there once this module is.
    library: Any = torch.library.Library("attnres", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name, arguments in _SCHEMAS.items():
        library.define(f"cpp_{name}({arguments}) -> ()", tags=(torch.Tag.needs_exact_strides,))
        library.impl(f"cpp_{name}", partial(_run, name), "CPU")
        torch.library.register_fake(f"attnres::cpp_{name}", lambda *_: None, lib=library)
    return library


_LIBRARY = _defined()
NAMES = tuple(_SCHEMAS)
OPERATORS: dict[str, Callable[..., None]] = {
    name: getattr(torch.ops.attnres, f"cpp_{name}").default for name in NAMES
}
"""The operators by name: ``OPERATORS["phase1"]``."""
