"""Say why residual-looking additions are not converted: what changes their carrier on the way."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from attnres_compile.passes import operations as ops
from attnres_compile.passes.dataflow import Dataflow, Reads
from attnres_compile.passes.graph_values import module_path, shape_of, source_line
from attnres_compile.passes.streams import Addition, Refusal

_REASONS = {
    "post-norm": "post-norm: the carrier passes a norm between residual additions, so block sums "
    "do not add up to it",
    "post-activation": "post-activation: the carrier passes an activation between residual "
    "additions, so block sums do not add up to it",
    "clamped-carrier": "the carrier is clamped between residual additions (in T5, to float16's "
    "range); use a dtype that needs no clamp",
    "dropout": "the carrier passes dropout between residual additions; dropout belongs on the "
    "branch",
    "narrowing-cast": "the carrier passes a narrowing cast between residual additions, which "
    "changes its value; keep the stream in one dtype",
    "quantised-carrier": "the carrier is quantised between residual additions; keep the stream in "
    "floating point",
    "scaled-carrier": "the carrier is scaled between residual additions, so block sums do not add "
    "up to it",
    "changed-carrier": "the carrier is changed between residual additions, so block sums do not "
    "add up to it",
    "single-sublayer": "a stream of one sublayer has nothing to choose from",
}
_LONGEST_INTERRUPTION = 16  # nodes; the longest decomposed norm seen has 11


def explain_short_chains(reads: Reads, chains: Sequence[Sequence[Addition]]) -> list[Refusal]:
    """Why chains of fewer than two sublayers are no streams: what interrupts the carrier."""
    ends = {chain[-1].node: position for position, chain in enumerate(chains)}
    kinds: dict[int, str] = {}
    for position, chain in enumerate(chains):
        crossed, end = _walk_up_to_state(chain[0].previous, reads, ends)
        if end is not None and crossed:
            kinds[position] = kinds[ends[end]] = _interruption(crossed)
        elif _stands_between_activations(chain, reads):
            kinds.setdefault(position, "post-activation")
    refusals = []
    for position, chain in enumerate(chains):
        kind = kinds.get(position, "single-sublayer")
        refusals += [_refusal(step.node, kind) for step in chain if step.is_residual]
    return refusals


def explain_altered_skips(
    view: Dataflow, reads: Reads, candidates: Iterable[fx.Node]
) -> list[Refusal]:
    """Sums that would be residual additions had their skip not been scaled, dropped or rounded.

    In ``0.9 * x + f(x)`` the branch depends on x, but no operand carries x. That alone would fit a
    rotary embedding too, so the branch must depend on x through a matrix product or convolution.
    """
    altered = [found for node in candidates for found in _altered_skips(node, reads)]
    sources = {skip.source: None for skip in altered}
    if not sources:
        return []
    bit, _, projected = view.dependency_masks(sources, mixes=ops.is_projection)
    kinds = {skip.node: skip.kind for skip in altered if projected[skip.branch] & bit[skip.source]}
    return [_refusal(node, kind) for node, kind in kinds.items()]


@dataclass(frozen=True)
class _AlteredSkip:
    """The addition ``node = g(source) + branch`` with an element-wise g of the kind named."""

    node: fx.Node
    source: fx.Node
    branch: fx.Node
    kind: str


def _altered_skips(node: fx.Node, reads: Reads) -> list[_AlteredSkip]:
    operands = ops.operands(node)
    if len(operands) != 2 or shape_of(operands[0]) != shape_of(operands[1]):
        return []
    found = []
    for skip, branch in (operands, operands[::-1]):
        crossed, source = _walk_up_alterations(skip, reads)
        scaled = _scales_operand(node, skip)
        if crossed or scaled:
            kind = _interruption(crossed) if crossed else "scaled-carrier"
            found.append(_AlteredSkip(node, source, reads.value_read(branch, node), kind))
    return found


def _scales_operand(node: fx.Node, operand: fx.Node) -> bool:
    """Whether the addition multiplies this operand: ``torch.add(branch, skip, alpha=0.5)``."""
    second = operand is ops.operands(node)[1]
    return second and ops.operation(node) == "add" and ops.argument(node, 2, "alpha", 1) != 1


def _walk_up_alterations(node: fx.Node, reads: Reads) -> tuple[list[fx.Node], fx.Node]:
    """From an operand back over scalings by constants, dropout and narrowing casts."""
    crossed: list[fx.Node] = []
    current = reads.origin(node)
    while len(crossed) < _LONGEST_INTERRUPTION:
        source = _altered(current)
        if source is None:
            break
        crossed.append(current)
        current = reads.origin(source)
    return crossed, current


def _altered(node: fx.Node) -> fx.Node | None:
    """What a scaling by constants, a dropout or a narrowing cast is applied to."""
    name = ops.operation(node)
    operands = ops.operands(node)
    same = [operand for operand in operands if shape_of(operand) == shape_of(node)]
    if name in ops.DROPOUTS or (name in ops.CASTS and operands):
        return operands[0]
    if name not in ("mul", "div") or len(same) != 1:
        return None
    constant = all(operand is same[0] or ops.is_constant(operand) for operand in operands)
    return same[0] if constant else None


def _stands_between_activations(chain: Sequence[Addition], reads: Reads) -> bool:
    """One ResNet block whose neighbours are projected: activation, sum, activation."""
    before = ops.operation(chain[0].previous)
    after = reads.of(chain[-1].node)
    users = {read.user for read in after}
    return (
        before in ops.ACTIVATIONS
        and len(users) == 1
        and ops.operation(users.pop()) in ops.ACTIVATIONS
    )


def _walk_up_to_state(
    node: fx.Node, reads: Reads, ends: Container[fx.Node]
) -> tuple[list[fx.Node], fx.Node | None]:
    """From a root back, over same-shaped element-wise nodes and norms, to the end of a chain."""
    crossed: list[fx.Node] = []
    current = node
    for _ in range(_LONGEST_INTERRUPTION):
        if reads.origin(current) in ends:
            return crossed, reads.origin(current)
        if not (ops.is_elementwise(current) or ops.operation(current) in ops.NORMS):
            return crossed, None
        crossed.append(current)
        same = [a for a in ops.tensor_arguments(current) if shape_of(a) == shape_of(node)]
        if not same:
            return crossed, None
        current = same[0] if len(same) == 1 else max(same, key=lambda a: len(a.users))
    return crossed, None


def _interruption(crossed: list[fx.Node]) -> str:
    names = {ops.operation(node) for node in crossed}
    if names & ops.NORMS or any(_multiplies_by_statistic(node) for node in crossed):
        return "post-norm"
    if names & ops.CLAMPS:
        return "clamped-carrier"
    if names & ops.ACTIVATIONS:
        return "post-activation"
    if names & ops.DROPOUTS:
        return "dropout"
    if names & ops.QUANTIZERS:
        return "quantised-carrier"
    if any(ops.operation(n) in ops.CASTS and not ops.is_value_preserving(n) for n in crossed):
        return "narrowing-cast"
    return "scaled-carrier" if names & {"mul", "div"} else "changed-carrier"


def _multiplies_by_statistic(node: fx.Node) -> bool:
    """The last step of a decomposed norm: the carrier times an inverse root mean square."""
    if ops.operation(node) not in ("mul", "div"):
        return False
    makers = {ops.operation(part) for part in ops.tensor_arguments(node)}
    return bool(makers & {"rsqrt", "sqrt", "std", "linalg_vector_norm", "norm", "reciprocal"})


def _refusal(node: fx.Node, kind: str) -> Refusal:
    return Refusal(kind, _REASONS[kind], module_path(node), source_line(node))
