"""Fuse what stands beside a site into its ``attnres::phase2``: the addition before, the norm after.

The addition ``partial + branch`` moves in when the site is the first to use its result, and uses it
as its partial sum alone. The norm, a LayerNorm or RMSNorm over the channels, fused or spelled in
steps, moves in when it reads the mix as it is; if the mix has other readers too it is written
beside the normed one. Everything else is left as it stands, which is correct as well.

Contract: the same values to rounding (in 16-bit dtypes a norm in steps rounds in between, the fused
one does not); only the fused nodes are removed.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnres_compile.passes import operations as ops
from attnres_compile.passes.dataflow import Dataflow
from attnres_compile.passes.gradient_modes import GradientMode, gradient_modes
from attnres_compile.passes.graph_editor import Editor, hoist, refresh
from attnres_compile.passes.graph_values import dtype_of, is_tensor, shape_of
from attnres_compile.passes.keep_layouts import put_in_place_of
from attnres_compile.passes.schedule_two_phase import summands

PHASE2 = torch.ops.attnres.phase2.default
COMPLETE = torch.ops.attnres.complete.default


def fuse_neighbours(graph: fx.Graph) -> None:
    """Moves additions and norms into the ``attnres::phase2`` nodes of a graph, in place."""
    view = Dataflow.of(graph)
    modes = gradient_modes(graph.nodes, at_start=torch.is_grad_enabled())
    sites = [node for node in graph.nodes if node.target is PHASE2]
    with_addition = [site for site in sites if _can_add(site, view, modes)]
    # By where they are computed: no gradient comes through a site that records none.
    stand_ins: defaultdict[GradientMode, dict[fx.Node, fx.Node]] = defaultdict(dict)
    for node in list(graph.nodes):
        if node in with_addition:
            _fuse_addition(node)
        if node.target is PHASE2:
            _fuse_norm(node, view, modes)
        if node.target in (PHASE2, COMPLETE):
            _pass_on_gradient(node, stand_ins[modes[node]])


def _can_add(site: fx.Node, view: Dataflow, modes: Mapping[fx.Node, GradientMode]) -> bool:
    """Whether the site's partial sum may as well be formed there: nobody needs it earlier."""
    addends: Any = site.kwargs["addends"]
    sources: Any = site.kwargs["sources"]
    both = summands(addends[0]) if len(addends) == 1 else []
    if not both or modes[addends[0]] != modes[site] or addends[0] in sources:
        return False
    if any(user < site for user in addends[0].users):
        return False
    return not any(view.writes_between(addend, addends[0], site) for addend in both)


def _fuse_addition(site: fx.Node) -> None:
    addends: Any = site.kwargs["addends"]
    (partial,) = addends
    both = summands(partial)
    with site.graph.inserting_after(site):
        updated = Editor(site.graph, site).call(operator.getitem, site, 0)
    put_in_place_of(partial, updated)
    site.update_kwarg("addends", both)
    refresh(site)
    site.graph.erase_node(partial)


def _pass_on_gradient(node: fx.Node, stand_ins: dict[fx.Node, fx.Node]) -> None:
    """What a block's first branch gets from its own site goes through the addition after it.

    That site takes the branch as it is, so that its gradient comes from two places, and adding
    them up would cost three rows. A stand-in as third addend brings the one to the other.
    """
    in_site = node.target is PHASE2
    addends: Any = node.kwargs["addends"] if in_site else node.args[0]
    if in_site and len(addends) == 1:
        with node.graph.inserting_after(node):
            stand_ins[addends[0]] = Editor(node.graph, node).call(operator.getitem, node, 0)
        return
    known = [addend for addend in addends if addend in stand_ins]
    if len(addends) != 2 or len(known) != 1:
        return
    (other,) = set(addends) - set(known)
    three = [known[0], other, stand_ins[known[0]]]
    if in_site:
        node.update_kwarg("addends", three)
    else:
        node.update_arg(0, three)


@dataclass(frozen=True)
class _Norm:
    """A norm over the channels; `node` is its result, `inner` the nodes that only serve it."""

    kind: str
    node: fx.Node
    inner: tuple[fx.Node, ...]
    weight: fx.Node | None
    bias: fx.Node | None
    eps: float


def _fuse_norm(site: fx.Node, view: Dataflow, modes: Mapping[fx.Node, GradientMode]) -> None:
    mixed = next(u for u in site.users if u.target is operator.getitem and u.args[1] == 1)
    if site.kwargs["dim"] != -1 or view.writes_between(mixed, mixed):
        return
    norm = _norm_of(mixed)
    if norm is None or any(modes[node] != modes[site] for node in (norm.node, *norm.inner)):
        return
    parameters = (p for p in (norm.weight, norm.bias) if p is not None)
    if not all(hoist(p, site, norm.node, view) for p in parameters):
        return
    consumed = {norm.node, *norm.inner}
    site.update_kwarg("norm", norm.kind)
    site.update_kwarg("norm_weight", norm.weight)
    site.update_kwarg("norm_bias", norm.bias)
    site.update_kwarg("norm_eps", norm.eps)
    site.update_kwarg("norm_dtype", dtype_of(norm.node))
    site.update_kwarg("wants_mix", bool(set(mixed.users) - consumed))
    refresh(site)
    with site.graph.inserting_after(mixed):
        normed = Editor(site.graph, norm.node).call(operator.getitem, site, 2)
    put_in_place_of(norm.node, normed)
    for node in (norm.node, *reversed(norm.inner)):
        site.graph.erase_node(node)


def _norm_of(mixed: fx.Node) -> _Norm | None:
    """The norm that reads a mix: a single operator, or an RMSNorm in steps."""
    for user in mixed.users:
        if ops.operation(user) in ("layer_norm", "rms_norm"):
            found = _fused_norm(user, mixed)
        elif ops.operation(user) in ("pow", "square", "mul", *ops.CASTS):
            found = _norm_in_steps(user, mixed)
        else:
            found = None
        if found is not None:
            return found
    return None


def _fused_norm(node: fx.Node, mixed: fx.Node) -> _Norm | None:
    if node.op != "call_function" or ops.argument(node, 0, "input") is not mixed:
        return None
    kind = "layer" if ops.operation(node) == "layer_norm" else "rms"
    shape = ops.argument(node, 1, "normalized_shape")
    weight = ops.argument(node, 2, "weight")
    bias = ops.argument(node, 3, "bias") if kind == "layer" else None
    eps = ops.argument(node, 4, "eps", 1e-5) if kind == "layer" else ops.argument(node, 3, "eps")
    if eps is None and dtype_of(mixed) in (torch.float32, torch.float64):
        eps = torch.finfo(dtype_of(mixed)).eps
    if not isinstance(eps, float) or len(tuple(shape)) != 1:
        return None
    return _Norm(kind, node, (), weight, bias, eps)


def _norm_in_steps(first: fx.Node, mixed: fx.Node) -> _Norm | None:
    """``weight * (x * rsqrt(mean(x^2) + eps))``, with casts before and after, or none."""
    widened = ops.operation(first) in ops.CASTS and _is_wider(dtype_of(first), dtype_of(mixed))
    value = first if widened else mixed
    square = next((u for u in value.users if _is_square(u, value)), None)
    mean = _only_user(square, "mean")
    shifted = _only_user(mean, "add")
    root = _only_user(shifted, "rsqrt")
    scaled = _only_user(root, "mul")
    if square is None or mean is None or shifted is None or root is None or scaled is None:
        return None
    dims, eps = ops.argument(mean, 1, "dim"), _scalar(shifted)
    last = dims in (-1, [-1], (-1,)) and ops.argument(mean, 2, "keepdim") is True
    others = set(ops.tensor_arguments(scaled)) - {root}
    if not last or eps is None or len(others) != 1 or not others <= {value, mixed}:
        return None
    if widened and set(value.users) - {square, scaled}:
        return None  # somebody else reads the cast value
    end, weight, after = _weighted(scaled, mixed)
    inner = [first] if widened else []
    inner += [square, mean, shifted, root, scaled, *after]
    return _Norm("rms", end, tuple(node for node in inner if node is not end), weight, None, eps)


def _weighted(scaled: fx.Node, mixed: fx.Node) -> tuple[fx.Node, fx.Node | None, list[fx.Node]]:
    """Follows casts and one product with a weight [D]; the end, the weight, and what it passed."""
    end, weight, passed = scaled, None, []
    while len(end.users) == 1:
        (user,) = end.users
        name = ops.operation(user)
        others = [a for a in ops.operands(user) if a is not end]
        is_cast = name in ops.CASTS and is_tensor(user) and set(others) <= {mixed}
        if name == "mul" and weight is None and _is_weight(others, end):
            weight = others[0]
        elif not is_cast:
            break
        passed.append(user)
        end = user
    return end, weight, passed


def _is_weight(others: list[fx.Node], normed: fx.Node) -> bool:
    return len(others) == 1 and shape_of(others[0]) == shape_of(normed)[-1:]


def _is_wider(dtype: torch.dtype, than: torch.dtype) -> bool:
    return torch.promote_types(dtype, than) == dtype


def _is_square(node: fx.Node, value: fx.Node) -> bool:
    name = ops.operation(node)
    if name == "mul":
        return ops.operands(node) == [value, value]
    if ops.argument(node, 0, "input") is not value:
        return False
    return name == "square" or (name == "pow" and ops.argument(node, 1, "exponent") in (2, 2.0))


def _only_user(node: fx.Node | None, operation: str) -> fx.Node | None:
    if node is None or len(node.users) != 1:
        return None
    (user,) = node.users
    return user if ops.operation(user) == operation else None


def _scalar(node: fx.Node) -> float | None:
    """The number that an addition of a tensor and a number adds."""
    numbers = [a for a in node.args if isinstance(a, float)]
    return numbers[0] if len(numbers) == 1 and len(node.args) == 2 and not node.kwargs else None
