"""Have Inductor write calls of the C++ library as calls of functions, not of operators.

Between matrices nothing of PyTorch's dispatcher is left in the caches, nor of the interpreter: an
operator with its twenty arguments took 0.13 ms, where a site takes 0.2 to 0.4. The function that
the operator would come to takes 0.04, most of it Python's. It is told addresses of tensors and the
sizes, which Inductor knows when it writes the call.

Not so where whoever compiles asks for what only operators have: to be named by the profiler
(``cpp.enable_kernel_profile``), or to be called from C++ (``cpp_wrapper``).

Contract: values are the same bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from attnres_compile.kernels.cpp_library import DTYPES, NAMES


def call_directly() -> None:
    """Tells Inductor, in this process, how to write calls of the library."""
    from torch._inductor.codegen import custom_extern_kernel_codegen as custom

    for name in NAMES:
        for dtype in DTYPES.values():
            operator = f"torch.ops.attnres.cpp_{name}.{dtype}"
            written = custom.CustomCodegen(python=_writer(name, dtype))
            custom.CUSTOM_EXTERN_KERNEL_CODEGEN[operator] = written


def _writer(name: str, dtype: str) -> Callable[[Any, Callable[[str], None]], None]:
    functions = f"attnres_{dtype}"
    package = "from attnres_compile.kernels import cpp_library"
    found = f'{package}; {functions} = cpp_library.calls("{dtype}")'

    def write(node: Any, writeline: Callable[[str], None]) -> None:
        from torch._inductor.virtualized import V

        if torch._inductor.config.cpp.enable_kernel_profile:
            writeline(f"{node.python_kernel_name}({', '.join(node.codegen_args())})")
            return
        V.graph.wrapper_code.add_import_once(found)
        writeline(f"{functions}.{name}({', '.join(_arguments(node))})")

    return write


def _arguments(node: Any) -> list[str]:
    """Those of the operator, as they are written, and the sizes."""
    from torch._inductor.virtualized import V

    tensors = [_Written(_rows(each)) for each in node.inputs]
    given, _ = node.unflatten_args(tensors, node.constant_args)
    *tokens, width = node.inputs[0].get_size()
    wrapper: Any = V.graph.wrapper_code
    return [wrapper.val_to_arg_str(each) for each in (*given, math.prod(tokens), width)]


def _rows(tensor: Any) -> str:
    """A tensor in the generated code. Its rows are where those of the buffer are that it views."""
    from torch._inductor.ir import ReinterpretView

    if isinstance(tensor, ReinterpretView) and tensor.layout.offset == 0:
        return str(tensor.get_name())
    return str(tensor.codegen_reference())


class _Written:
    """Code that stands for a value."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __repr__(self) -> str:
        return self.code
