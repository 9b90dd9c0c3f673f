"""Say why residual-looking additions are not converted: what changes their carrier on the way."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from attnres_compile.passes import operations as ops
from attnres_compile.passes.alterations import (
    LONGEST_INTERRUPTION,
    is_scale,
    largest_part,
    scales_operand,
    walk_up_alterations,
)
from attnres_compile.passes.dataflow import Dataflow, Reads
from attnres_compile.passes.graph_values import is_tensor, module_path, shape_of, source_line
from attnres_compile.passes.streams import Addition, Refusal, ResidualStream

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
    "subtracted-skip": "the skip is subtracted from the branch, f(x) - x, so block sums do not add "
    "up to the state; x - f(x) is a residual addition",
    "gated-skip": "the skip is multiplied by a gate that is computed from the data, so block sums "
    "do not add up to the state; with the gate on the branch, x + g(x) * f(x), they do",
    "rearranged-carrier": "the carrier is sliced, concatenated or transposed between residual "
    "additions, so block sums do not have its shape; do that before or after the stream",
    "detached-carrier": "the carrier is detached between residual additions, and mixes would pass "
    "gradients round that; let gradients through, or detach what the stream starts from",
    "fused-layer": "PyTorch has fused a layer and its residual additions into one operator; export "
    "with gradients, or after torch.backends.mha.set_fastpath_enabled(False)",
    "fused-addition": "the residual addition is fused into another operator; write it as x + f(x)",
    "skip-as-factor": "the skip is a factor of the branch in the same operator, where it cannot be "
    "the state and read the mix at once; write it as x + x * f(x)",
    "changed-carrier": "the carrier is changed between residual additions, so block sums do not "
    "add up to it",
    "several-streams": "the model carries several residual streams at once and mixes them by a "
    "matrix between additions (hyper-connections), so block sums do not add up to them",
    "single-sublayer": "a stream of one sublayer has nothing to choose from",
}


_RANK_OF_STREAMS = 4  # batch, position, stream, channel
_OFFER = (
    "; AttnResConfig(delta_sources=True) converts it, with the differences that blocks make to the "
    "state as sources"
)


def offer_deltas(
    refused: Mapping[fx.Node, Refusal], streams: Iterable[ResidualStream]
) -> dict[fx.Node, Refusal]:
    """The refusals, with the option that converts them: `streams` are those found with it."""
    answered = {a.node for stream in streams if stream.deltas for a in stream.additions}
    return {
        node: replace(refusal, reason=refusal.reason + _OFFER) if node in answered else refusal
        for node, refusal in refused.items()
    }


def explain_short_chains(
    reads: Reads,
    chains: Sequence[Sequence[Addition]],
    everything: Sequence[Sequence[Addition]],
    altered: Iterable[fx.Node],
    *,
    delta_sources: bool,
) -> dict[fx.Node, Refusal]:
    """Why chains of fewer than two sublayers are no streams: what interrupts the carrier.

    It may lie between two chains, or between one and an addition whose skip is `altered`. With
    `delta_sources` an activation before and after is no reason any more. What else lies between one
    and another chain of `everything`, long ones too, is told beside the reason.
    """
    ends: dict[fx.Node, int | None] = dict.fromkeys(altered)
    ends |= {chain[-1].node: position for position, chain in enumerate(chains)}
    kinds: dict[int, str] = {}
    for position, chain in enumerate(chains):
        crossed, end = _walk_up_to_state(chain[0].previous, reads, ends)
        if end is not None and crossed:
            kinds[position] = _interruption(crossed)
            before = ends[end]
            if before is not None:
                kinds[before] = kinds[position]
        elif not delta_sources and _stands_between_activations(chain, reads):
            kinds.setdefault(position, "post-activation")
    breaks = _breaks(reads, everything)
    refused: dict[fx.Node, Refusal] = {}
    for position, chain in enumerate(chains):
        kind = kinds.get(position, "single-sublayer")
        cause = breaks.get(chain[-1].node) if kind == "single-sublayer" else None
        for step in filter(lambda step: step.is_residual, chain):
            refusal = _refusal(step.node, kind)
            refused[step.node] = refusal if cause is None else _with_cause(refusal, cause)
    return refused


def _breaks(reads: Reads, chains: Sequence[Sequence[Addition]]) -> dict[fx.Node, fx.Node]:
    """What comes between one chain and the next, by the last addition of either."""
    ends = {chain[-1].node for chain in chains}
    found: dict[fx.Node, fx.Node] = {}
    for chain in chains:
        crossed, end = _walk_up_to_state(chain[0].previous, reads, ends, over_anything=True)
        if end is None:
            continue
        changes = [n for n in crossed if not (ops.is_value_preserving(n) or ops.is_reshape(n))]
        for node in (end, chain[-1].node):
            if changes:
                found.setdefault(node, changes[-1])
    return found


def _with_cause(refusal: Refusal, cause: fx.Node) -> Refusal:
    line = source_line(cause) or "an unknown line"
    between = f"{ops.operation(cause)!r} on the carrier at {line}"
    return replace(refusal, reason=f"{refusal.reason}; {between} cuts it off from other additions")


def explain_altered_skips(
    view: Dataflow, reads: Reads, candidates: Iterable[fx.Node]
) -> dict[fx.Node, Refusal]:
    """Sums that would be residual additions had their skip not been scaled, dropped or rounded.

    In ``0.9 * x + f(x)`` the branch depends on x, but no operand carries x. That alone would fit a
    rotary embedding too, so the branch must depend on x through a matrix product or convolution.
    """
    altered = [found for node in candidates for found in _altered_skips(node, reads)]
    sources = {skip.source: None for skip in altered}
    if not sources:
        return {}
    bit, _, projected = view.dependency_masks(sources, mixes=ops.is_projection)
    kinds = {skip.node: skip.kind for skip in altered if projected[skip.branch] & bit[skip.source]}
    return {node: _refusal(node, kind) for node, kind in kinds.items()}


def explain_own_factors(additions: Iterable[Addition]) -> dict[fx.Node, Refusal]:
    """Of ``torch.addcmul(x, x, f(x))`` as a residual addition: one operand is skip and branch."""
    return {a.node: _refusal(a.node, "skip-as-factor") for a in additions if a.skip in a.branch}


def explain_fused_additions(view: Dataflow, reads: Reads) -> list[Refusal]:
    """Residual additions inside other operators, as in ``torch.baddbmm(x, a, b)``."""
    fused = [
        (node, reads.value_read(skip, node), reads.value_read(branch, node))
        for node in view.order
        for skip, branch in _fused_operands(node)
        if shape_of(skip) == shape_of(branch) or ops.is_projection(node)
    ]
    if not fused:
        return []
    bit, depends, projected = view.dependency_masks(
        {source: None for _, source, _ in fused}, mixes=ops.is_projection
    )
    found = {
        node: None
        for node, source, branch in fused
        if bit[source] & (depends if ops.is_projection(node) else projected)[branch]
    }
    return [_refusal(node, "fused-addition") for node in found]


def explain_fused_layers(view: Dataflow) -> list[Refusal]:
    """Layers of ``nn.TransformerEncoder`` in one operator, in exports made without gradients."""
    layers = (n for n in view.order if ops.operation(n) == "_transformer_encoder_layer_fwd")
    return [_refusal(node, "fused-layer") for node in layers]


def explain_mixed_streams(
    view: Dataflow, reads: Reads, candidates: Iterable[fx.Node]
) -> dict[fx.Node, Refusal]:
    """Additions ``matrix @ x + f(x)`` where x is a state [..., streams, channel], two in a row.

    A matrix alone would fit attention over a value to which something is added.
    """
    mixed = {node: pair for node in candidates if (pair := _mixed_state(node, reads)) is not None}
    before = {node: state for node, (state, _) in mixed.items() if state in mixed}
    chained = {*before, *before.values()}
    if not chained:
        return {}
    bit, _, projected = view.dependency_masks(
        {mixed[node][0]: None for node in chained}, mixes=ops.is_projection
    )
    return {
        node: _refusal(node, "several-streams")
        for node, (state, branch) in mixed.items()
        if node in chained and projected[branch] & bit[state]
    }


def _mixed_state(node: fx.Node, reads: Reads) -> tuple[fx.Node, fx.Node] | None:
    """The state whose streams are mixed in one operand of an addition, and the other operand."""
    operands = ops.operands(node)
    shape = shape_of(node)
    if len(operands) != 2 or len(shape) < _RANK_OF_STREAMS:
        return None
    for operand, branch in (operands, operands[::-1]):
        product = reads.value_read(operand, node)
        parts = ops.tensor_arguments(product)
        if ops.operation(product) not in ("matmul", "einsum") or len(parts) != 2:
            continue
        matrix, state = parts
        square = shape_of(matrix)[-2:] == (shape[-2], shape[-2])
        if square and shape_of(state) == shape:
            return reads.value_read(state, product), reads.value_read(branch, node)
    return None


def _fused_operands(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """Pairs of what may be the skip and (a factor of) the branch of an addition in an operator."""
    name = ops.operation(node)
    if name == "_foreach_add":
        lists = [part for part in node.args if isinstance(part, list | tuple)]
        pairs = list(zip(*lists, strict=True)) if len(lists) == 2 else []
        return [pair for a, b in pairs for pair in ((a, b), (b, a))]
    if not is_tensor(node):
        return []
    operands = ops.operands(node)
    if name in ("addmm", "baddbmm"):
        whole = shape_of(operands[0]) == shape_of(node)
        return [(operands[0], factor) for factor in operands[1:]] if whole else []
    if name == "sum" and ops.operation(operands[0]) == "stack":
        operands = ops.tensor_arguments(operands[0])
    elif name != "lerp":
        return []
    two = operands[:2] if name == "lerp" else operands
    return [(two[0], two[1]), (two[1], two[0])] if len(two) == 2 else []


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
        steps = list(walk_up_alterations(skip, node, reads))
        if steps or scales_operand(node, skip):
            negated = "subtracted-skip" if ops.operation(node) == "sub" else "scaled-carrier"
            kind = _interruption([step for step, _ in steps]) if steps else negated
            source = steps[-1][1] if steps else reads.value_read(skip, node)
            found.append(_AlteredSkip(node, source, reads.value_read(branch, node), kind))
        for source in _gated(reads.value_read(skip, node), reads):
            read = reads.value_read(branch, node)
            found.append(_AlteredSkip(node, source, read, "gated-skip"))
    return found


def _gated(product: fx.Node, reads: Reads) -> list[fx.Node]:
    """The factors behind a gate of the data: of the product's shape, the other one no constant."""
    factors = ops.operands(product) if ops.operation(product) == "mul" else []
    if len(factors) != 2:
        return []
    return [
        reads.value_read(factor, product)
        for factor, gate in (factors, factors[::-1])
        if shape_of(factor) == shape_of(product) and not is_scale(gate)
    ]


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
    node: fx.Node, reads: Reads, ends: Container[fx.Node], *, over_anything: bool = False
) -> tuple[list[fx.Node], fx.Node | None]:
    """From a root back to the end of a chain.

    Over element-wise nodes and norms of one shape, and over what slices, joins or turns that; or
    over any operation on a value.
    """
    crossed: list[fx.Node] = []
    current = node
    for _ in range(LONGEST_INTERRUPTION):
        if reads.origin(current) in ends:
            return crossed, reads.origin(current)
        rearranged = ops.operation(current) in ops.REARRANGEMENTS
        changed = not (ops.is_elementwise(current) or ops.operation(current) in ops.NORMS)
        if changed and not (rearranged or over_anything):
            return crossed, None
        crossed.append(current)
        source = largest_part(current) if rearranged or changed else None
        if source is not None and not is_tensor(source):  # one of several results, as in ATen
            crossed.append(source)
            source = largest_part(source)
        if source is not None:
            current = source
            continue
        tensors = [each for each in ops.tensor_arguments(current) if is_tensor(each)]
        same = [each for each in tensors if shape_of(each) == shape_of(current)]
        if not same:
            return crossed, None
        current = same[0] if len(same) == 1 else max(same, key=lambda a: len(a.users))
    return crossed, None


def _interruption(crossed: list[fx.Node]) -> str:
    names = {ops.operation(node) for node in crossed}
    if "detach" in names:  # which ends the streams of deltas too
        return "detached-carrier"
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
    if names & {"mul", "div", "neg"}:
        return "scaled-carrier"
    return "rearranged-carrier" if names & ops.REARRANGEMENTS else "changed-carrier"


def _multiplies_by_statistic(node: fx.Node) -> bool:
    """The last step of a decomposed norm: the carrier times an inverse root mean square."""
    if ops.operation(node) not in ("mul", "div"):
        return False
    makers = {ops.operation(part) for part in ops.tensor_arguments(node) if not is_scale(part)}
    return bool(makers & {"rsqrt", "sqrt", "std", "linalg_vector_norm", "norm", "reciprocal"})


def _refusal(node: fx.Node, kind: str) -> Refusal:
    return Refusal(kind, _REASONS[kind], module_path(node), source_line(node), node.name)
