"""Have Inductor write down what the C++ library reads once, however many sites read it.

Inductor computes a value that is made by loops where it is read. Of an operator that it knows
nothing about it lays out the arguments for every call by itself: the root of a stream, where it is
the sum of two embeddings, was written anew for each of 48 sites. Here an argument is written where
it is first read, and stays.

What a call writes over (``write_in_place.py``) may have readers that Inductor has not computed yet,
since it computes loops where their results are read. They are computed before the call.

Contract: values are the same bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from attnres_compile.kernels.cpp_library import DTYPES, NAMES
from attnres_compile.passes.cpp_calls import written_by
from attnres_compile.passes.graph_values import value_of


def realize_rows() -> None:
    """Tells Inductor, in this process, how to lower calls of the library."""
    from torch._inductor.lowering import make_fallback

    for name in NAMES:
        packet = getattr(torch.ops.attnres, f"cpp_{name}")
        for dtype in DTYPES.values():
            overload = getattr(packet, dtype)
            make_fallback(overload, layout_constraint=_written_once)  # type: ignore[no-untyped-call]


def _written_once(call: fx.Node, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """The arguments, in memory and row by row, as their example values are."""
    from torch._inductor.ir import TensorBox
    from torch._inductor.lowering import constrain_to_fake_tensors
    from torch._inductor.virtualized import V

    for argument in pytree.tree_leaves(args):
        if isinstance(argument, TensorBox):
            argument.realize()
    for room in written_by(call, args):
        V.graph.mark_buffer_mutated(room.get_name())  # which has its readers computed
    examples = pytree.tree_map_only(fx.Node, value_of, call.args)
    laid_out: tuple[Any, Any] = constrain_to_fake_tensors(  # type: ignore[no-untyped-call]
        args, kwargs, examples, {}
    )
    return laid_out
