"""The C++ library for CPUs, compiled on first use, and its functions as operators that write.

The loops over tokens stand in ``templates/complete.cpp``, ``phase1.cpp``, ``phase2.cpp`` and
``sum_tokens.cpp``, what they do with one row in ``rows.h`` and with several in ``products.h``. A
function of it is the operator ``attnres::cpp_<name>``, with an overload per dtype of the stream. It
returns nothing and writes to the tensors that its schema marks. So whoever calls it says where
results go, and in a compiled graph Inductor plans that memory with all the rest. The functions have
their arguments in the order of the schemas, then the sizes.

The way from an operator to its function is generated, too, as C++ upon PyTorch's stable ABI: in
Python it took 0.2 ms a call inside a model, whose matrices leave nothing of the interpreter in the
caches. Past the dispatcher it still takes 0.13 ms there. So code that Inductor has written comes by
a shorter way, `calls`, which takes 0.04 ms (``passes/call_directly.py``).
"""

from __future__ import annotations

import ctypes
import re
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from attnres_compile.errors import BackendError

_TEMPLATES = Path(__file__).parent / "templates"
_KERNELS = ("rows.h", "products.h", "complete.cpp", "phase1.cpp", "phase2.cpp", "sum_tokens.cpp")
_SOURCES = [_TEMPLATES / name for name in (*_KERNELS, "operators.h", "calls.h")]
# Inductor vectorises by itself and has the compiler not do it; here the compiler shall.
_FLAGS = ("-ftree-loop-vectorize", "-ffp-contract=fast", "-fno-math-errno")
DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
# Rows are contiguous, of the dtype of the stream, as many and as wide as those of the first source,
# [*tokens, width], in any shape. What is added to the partial sum may come without the bias of its
# linear layer, an argument then (passes/absorb_biases.py).
_SCHEMAS = {
    "complete": (
        "Tensor[] sources, Tensor? branch, Tensor? branch_bias, Tensor queries, int sites,"
        " float eps, Tensor(a!)? sum, Tensor(b!) logits, Tensor(c!) inverse_rms"
    ),
    "complete_backward": (
        "Tensor[] sources, Tensor? grad_source, Tensor grad_logits, Tensor queries, int sites,"
        " Tensor logits, Tensor inverse_rms, Tensor(a!)? grad, Tensor(b!)? grad_queries,"
        " Tensor(c!)? grad_branch_bias"
    ),
    "phase1": (
        "Tensor[] sources, int count, Tensor[] logits, int sites, Tensor(a!)[] mixes,"
        " Tensor(b!) statistics, Tensor(c!)? weights"
    ),
    "phase1_backward": (
        "Tensor[] sources, int count, Tensor weights, int sites, Tensor[] grad_mixes, int[] mixed,"
        " Tensor grad_statistics, Tensor[] arriving, int[] arrived, Tensor(a!)[] grads,"
        " int[] wanted, Tensor(b!)? grad_logits"
    ),
    "phase2": (
        "Tensor[] sources, int count, Tensor? statistics, Tensor? branch, Tensor? branch_bias,"
        " Tensor query, Tensor? gain, float eps, float factor, int norm, Tensor? weight,"
        " Tensor? bias, float norm_eps, bool wide, Tensor(a!)? partial, Tensor(b!)? mixed,"
        " Tensor(c!)? normed, Tensor(d!)? saved"
    ),
    "phase2_backward": (
        "Tensor[] sources, int count, Tensor? statistics, Tensor[] arriving, int[] arrived,"
        " Tensor? grad_mixed, Tensor? grad_normed, bool wide, Tensor query, float factor,"
        " int norm, Tensor? weight, Tensor saved, Tensor(a!)[] grads, int[] wanted,"
        " Tensor(b!)? grad_statistics, Tensor(c!)? grad_query, Tensor(d!)? grad_weight,"
        " Tensor(e!)? grad_bias, Tensor(f!)? grad_branch_bias"
    ),
    "sum_tokens": "Tensor[] sources, Tensor(a!) sum",
}
# How an argument is written in C++: what arrives from the dispatcher, what is made of it or of what
# arrives from Python, and what the function is handed.
_TYPES = {
    "Tensor": ("Tensor", "Address", "{0}"),
    "Tensor?": ("std::optional<Tensor>", "Address", "{0}"),
    "Tensor[]": ("std::vector<Tensor>", "Addresses", "{0}"),
    "int[]": ("std::vector<int64_t>", "std::vector<int64_t>", "{0}.data(), int64_t({0}.size())"),
    "int": ("int64_t", "int64_t", "{0}"),
    "bool": ("bool", "bool", "{0}"),
    "float": ("double", "double", "{0}"),
}
NAMES = tuple(_SCHEMAS)
_LARGE_BLOCK = 31 << 20


def operator(name: str, dtype: torch.dtype) -> Callable[..., None]:
    """``operator("phase2", torch.float32)``, ready to be called."""
    prepare(dtype)
    overload: Callable[..., None] = getattr(_packet(name), DTYPES[dtype])
    return overload


def prepare(dtype: torch.dtype) -> None:
    """Compiles the library for streams of `dtype`, so that a missing compiler shows at once.

    Loading it registers its operators, with whoever calls them: compiled code of this process.

    Raises:
        BackendError: there is no compiler, it failed, or what it made cannot be loaded.
    """
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        _library(dtype)
    except (CppCompileError, InvalidCxxCompiler, OSError) as error:
        cause = (str(error).strip().splitlines() or ["no C++ compiler"])[-1]
        raise BackendError(
            "the C++ library for mixes on the CPU could not be built and loaded "
            f"({type(error).__name__}: {cause}); install g++ or clang, and let "
            "TORCHINDUCTOR_CACHE_DIR be a folder that programs may run from."
        ) from error


@cache
def calls(dtype: str) -> Any:
    """The functions for streams of `dtype`: ``calls("float32").phase2(...)``.

    They take what the operators take, in the same order, and then the number of tokens and the
    width. Tensors are read as they are: contiguous, of the right dtype, whatever shape they say.

    Raises:
        BackendError: the library was built without Python's headers.
    """
    (torch_dtype,) = (each for each, name in DTYPES.items() if name == dtype)
    library = _library(torch_dtype)
    if not hasattr(library, "calls"):
        raise BackendError(
            "compiled code calls the C++ library from Python, whose headers were not there when it "
            "was built; install them (python3-dev), empty TORCHINDUCTOR_CACHE_DIR, and start again."
        )
    make = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p)(("calls", library))
    guards: Any = torch._C._dynamo.guards
    return make(guards._torchinductor_pyobject_tensor_data_ptr)


@cache
def _library(dtype: torch.dtype) -> Any:
    from torch._inductor.codecache import CppCodeCache

    name = DTYPES[dtype]
    source = [f"#define FOR_{name.upper()}", *(each.read_text() for each in _SOURCES)]
    source += [_operator(each) for each in NAMES]
    source += ["STABLE_TORCH_LIBRARY_IMPL(attnres, CPU, library) {"]
    source += [f'  library.impl("cpp_{n}.{name}", TORCH_BOX(&operate::{n}));' for n in NAMES]
    source += ["}", *(_call(each) for each in NAMES)]
    source += [
        "static PyMethodDef methods[] = {",
        *(f"  METHOD({each})," for each in NAMES),
        "  {}};",
    ]
    source += ['extern "C" PyObject *calls(DataPointer *pointer) {']
    source += ["  return module_of(methods, pointer);", "}", "#endif"]
    library = CppCodeCache.load("\n".join(source), extra_flags=_FLAGS)
    _keep_pages()
    return library


def _keep_pages() -> None:
    """Has the C library keep memory that a step frees for the next one.

    The sources of a model are there until the end of a step and go together. glibc then returns
    them to the system, and the next step fetches them page by page: 3000 to 4000 page faults in a
    step of 24 layers of 2048 x 128, or 1 to 3 % of it. It keeps twice as much as the largest block
    that was freed so far, of up to 32 MB. So one is freed, once, whose pages nobody has touched.
    """
    torch.empty(_LARGE_BLOCK, dtype=torch.uint8)


@cache
def is_available(dtype: torch.dtype) -> bool:
    """Whether there is a library for streams of `dtype`; where it cannot be, that is told once."""
    if dtype not in DTYPES:
        return False
    try:
        prepare(dtype)
    except BackendError as error:
        warnings.warn(
            f"mixes run in plain PyTorch, which takes several times as long: {error}", stacklevel=2
        )
        return False
    return True


def _operator(name: str) -> str:
    """An operator in C++: takes tensors, hands their addresses and sizes to the function."""
    parameters = ", ".join(f"{_TYPES[kind][0]} {each}" for kind, each in _arguments(name))
    made = " ".join(f"auto {each}_ = unwrapped({each});" for _, each in _arguments(name))
    return (
        f"namespace operate {{ void {name}({parameters}) {{"
        f" Sizes sizes(sources[0]); {made} {_handed(name)} }} }}"
    )


def _call(name: str) -> str:
    """A function for Python, which takes the same and the sizes."""
    made = " ".join(f"{_TYPES[kind][1]} {each}_ = given;" for kind, each in _arguments(name))
    return (
        f"static PyObject *call_{name}(PyObject *, PyObject *const *arguments, Py_ssize_t count) {{"
        f" return called(arguments, count, {len(list(_arguments(name))) + 2}, [](Given given) {{"
        f" {made} int64_t tokens = given, width = given; Sizes sizes(tokens, width);"
        f" if (PyErr_Occurred()) return; Unlocked unlocked; {_handed(name)} }}); }}"
    )


def _handed(name: str) -> str:
    """The call of a function, once its arguments are made."""
    values = ", ".join(_TYPES[kind][2].format(f"{each}_") for kind, each in _arguments(name))
    return f"::{name}({values}, sizes.tokens, sizes.width, sizes.threads());"


def _arguments(name: str) -> Iterator[tuple[str, str]]:
    """The type and the name of each argument, without the marks of what is written to."""
    for argument in _SCHEMAS[name].split(", "):
        kind, own_name = argument.split()
        yield re.sub(r"\(.!\)", "", kind), own_name


def _packet(name: str) -> Any:
    return getattr(torch.ops.attnres, f"cpp_{name}")


def _defined() -> Any:
    # As long as it lives there are the operators; graphs that Inductor keeps on disk name them.
    library: Any = torch.library.Library("attnres", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name, arguments in _SCHEMAS.items():
        for dtype in DTYPES.values():
            overload = f"cpp_{name}.{dtype}"
            schema = f"{overload}({arguments}) -> ()"
            library.define(schema)  # how it is laid out: passes/realize_rows.py
            torch.library.register_fake(f"attnres::{overload}", lambda *_: None, lib=library)
    return library


_LIBRARY = _defined()
