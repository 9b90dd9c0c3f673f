"""Who reads a state, which of them do not see its scale, and which dimension is the channel.

*Scale invariance.* A reader is scale-invariant if multiplying the state by a constant leaves every
value it passes on unchanged (up to the eps of a norm). Fused norms are so by definition; for
anything else the degree of homogeneity is followed through the graph: a state has degree 1,
``pow(2)`` doubles it, ``rsqrt`` halves and negates it, a product adds degrees. A reader all of
whose paths arrive at degree 0 is a norm, however it was spelled.
Batch norm is none, in either mode: its running statistics keep the scale.

*Channel.* Linear layers and norms over the last dimension vote for the last one, convolutions,
batch and group norms for dimension 1, scales and biases for the one they vary along, seen through
element-wise nodes and transpositions, both on the readers of the states and on the branches that
make them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from heapq import heappop, heappush

from torch import fx

from attnres_compile.passes import operations as ops
from attnres_compile.passes.dataflow import Dataflow, Read
from attnres_compile.passes.graph_values import is_tensor, module_path, shape_of, source_line
from attnres_compile.passes.streams import ResidualStream, State

_LARGEST_EPS = 1e-2
_REDUCTIONS = frozenset(
    "mean sum amax avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d"
    " adaptive_avg_pool3d".split()
)
_CHANNEL_LAST = frozenset(
    "linear layer_norm rms_norm native_layer_norm addmm mm _fused_rms_norm".split()
)
_CONVOLUTIONS = frozenset(
    "conv1d conv2d conv3d convolution _convolution conv_transpose1d conv_transpose2d"
    " conv_transpose3d".split()
)
_CHANNEL_FIRST = frozenset(
    "batch_norm native_batch_norm group_norm native_group_norm instance_norm cudnn_batch_norm"
    " _native_batch_norm_legit _native_batch_norm_legit_no_training".split()
)
_WEIGHTINGS = ops.ADDITIONS | {"mul", "div"}
_FARTHEST_VOTER = 24  # nodes; a voter stands a few steps away, behind activations and views


@dataclass(frozen=True)
class Reader:
    """One reader of a site.

    Attributes:
        module_path: the module that reads; the root's is the empty string.
        operation: what it does first with the state, or ``norm`` for a norm in any spelling.
        scale_invariant: whether it sees the state only up to a factor.
        source: its source line, ``file.py:123``.
    """

    module_path: str
    operation: str
    scale_invariant: bool
    source: str


def classify_readers(state: State) -> tuple[Reader, ...]:
    """The readers of a site, one per module and operation, in graph order."""
    readers: dict[tuple[str, str], Reader] = {}
    by_module: dict[tuple[str, bool], list[Read]] = {}
    for read in state.reads:
        by_module.setdefault((_reading_module(read), read.user.op == "output"), []).append(read)
    for (path, _), group in by_module.items():
        invariant = _is_scale_invariant(group)
        for read in group:
            name = "norm" if invariant else ops.operation(read.user)
            reader = Reader(path, name, invariant, source_line(read.user))
            readers.setdefault((path, name), reader)
    return tuple(readers.values())


def channel_dimension(stream: ResidualStream) -> int | None:
    """The channel dimension of a stream: -1 or 1; None where the votes are tied or missing.

    It is 0 for a convolutional stream without a batch dimension. With no vote at all, two- and
    three-dimensional states are taken as tokens (last dimension).
    """
    rank = len(shape_of(stream.states[0].node))
    votes: Counter[int] = Counter()
    turns = {turn for state in stream.states for turn in state.turns}
    for state in stream.states:
        if state.turns:
            continue  # what lies in another layout than the root counts its dimensions otherwise
        votes.update(_votes_of_readers(state, rank, turns))
        if state.addition is not None:
            votes.update(_votes_of_branch(state, rank))
    last, first = votes[rank - 1], votes[1]
    if votes[0] > max(last, first):
        return 0
    if rank == 2 or (not votes and rank == 3):
        return -1
    if last == first:
        return None
    return -1 if last > first else 1


def _reading_module(read: Read) -> str:
    return "" if read.user.op == "output" else module_path(read.user)


def _is_scale_invariant(reads: list[Read]) -> bool:
    """Follows degrees of homogeneity from the reads until every path is at degree 0."""
    degrees: dict[fx.Node, Fraction] = {read.operand: Fraction(1) for read in reads}
    pending = sorted({read.user for read in reads})  # in graph order: inputs before their users
    seen = set(pending)
    while pending:
        node = heappop(pending)
        degree = _degree(node, degrees)
        if degree is None:
            return False
        if degree == 0:
            continue
        degrees[node] = degree
        users = [user for user in node.users if node in ops.value_arguments(user)]
        if not users:
            return False
        for user in users:
            if user not in seen:
                seen.add(user)
                heappush(pending, user)
    return True


def _degree(node: fx.Node, degrees: dict[fx.Node, Fraction]) -> Fraction | None:
    """The degree of homogeneity of a node in the state; None where it has none that is known."""
    name = ops.operation(node)
    if name in ops.SCALE_INVARIANT_NORMS:
        return Fraction(0)
    if node.op == "output" or ops.writes_into(node) is not None:
        return None
    inputs = [degrees.get(argument, Fraction(0)) for argument in ops.value_arguments(node)]
    if not inputs:
        return None
    if name in _ROOTS_AND_POWERS:
        exponent = _ROOTS_AND_POWERS[name]
        return inputs[0] * exponent
    if name == "pow":
        exponent_argument = ops.argument(node, 1, "exponent")
        plain = isinstance(exponent_argument, int | float)
        return inputs[0] * Fraction(exponent_argument) if plain else None
    if name == "mul":
        return sum(inputs, Fraction(0)) * (2 if _squares(node) else 1)
    if name == "div":
        return _degree_of_quotient(node, inputs)
    if name in ("add", "sub"):
        return _degree_of_sum(node, inputs)
    if name in _FLOORS:
        floor = ops.argument(node, 1, "min")
        return inputs[0] if isinstance(floor, float) and abs(floor) <= _LARGEST_EPS else None
    if name in _HOMOGENEOUS:
        return inputs[0]
    return None


_ROOTS_AND_POWERS = {
    "rsqrt": Fraction(-1, 2),
    "sqrt": Fraction(1, 2),
    "reciprocal": Fraction(-1),
    "square": Fraction(2),
    "var": Fraction(2),
    "std": Fraction(1),
    "linalg_vector_norm": Fraction(1),
    "norm": Fraction(1),
    "linalg_norm": Fraction(1),
    "abs": Fraction(1),
    "sign": Fraction(0),
}
_FLOORS = frozenset({"clamp", "clamp_min"})
_HOMOGENEOUS = (
    ops.CASTS
    | ops.COPIES
    | ops.RESHAPES
    | ops.PERMUTATIONS
    | ops.SLICES
    | ops.DROPOUTS
    | _REDUCTIONS
    | {"neg"}
)


def _degree_of_quotient(node: fx.Node, inputs: list[Fraction]) -> Fraction:
    if len(inputs) == 2:
        return inputs[0] - inputs[1]
    return inputs[0] if isinstance(node.args[0], fx.Node) else -inputs[0]


def _squares(node: fx.Node) -> bool:
    return len(node.args) == 2 and node.args[0] is node.args[1]


def _degree_of_sum(node: fx.Node, inputs: list[Fraction]) -> Fraction | None:
    """Equal degrees add up; a small constant is the eps of a norm."""
    numbers = [a for a in node.args if isinstance(a, int | float)]
    if numbers:
        return inputs[0] if abs(numbers[0]) <= _LARGEST_EPS else None
    return inputs[0] if all(degree == inputs[0] for degree in inputs) else None


def _votes_of_readers(state: State, rank: int, turns: set[fx.Node]) -> list[int]:
    votes = []
    for read in state.reads:
        in_layout = turns.isdisjoint(Dataflow.path_to_origin(read.operand))
        if in_layout and len(shape_of(read.operand)) == rank:
            votes += _vote_forward(read.user, read.operand, tuple(range(rank)))
    return votes


def _vote_forward(user: fx.Node, operand: fx.Node, order: tuple[int, ...]) -> list[int]:
    """The first operation downstream that tells the channel, as a dimension of the state."""
    pending = [(user, operand, order)]
    for node, source, dims in pending:
        if len(pending) > _FARTHEST_VOTER:
            return []
        told = _tells_channel(node, len(dims))
        if told is not None:
            return [dims[told]]
        moved = _moved(node, source, dims)
        if moved is not None:
            pending += [(after, node, moved) for after in node.users]
    return []


def _votes_of_branch(state: State, rank: int) -> list[int]:
    assert state.addition is not None
    branches = [part for part in state.addition.branch if len(shape_of(part)) == rank]
    return [vote for branch in branches for vote in _vote_backward(branch, rank)]


def _vote_backward(branch: fx.Node, rank: int) -> list[int]:
    """The first operation upstream that tells the channel, as a dimension of the state."""
    pending: list[tuple[fx.Node, tuple[int | None, ...]]] = [(branch, tuple(range(rank)))]
    for _ in range(_FARTHEST_VOTER):
        if not pending:
            return []
        node, dims = pending.pop()
        told = _tells_channel(node, len(shape_of(node))) if is_tensor(node) else None
        if told is not None:
            if told in dims and dims.index(told) in (0, 1, rank - 1):
                return [dims.index(told)]
        elif ops.is_elementwise(node):
            pending += reversed([(part, d) for part, d in _dimensions_above(node, dims)])
    return []


def _dimensions_above(
    node: fx.Node, dims: tuple[int | None, ...]
) -> Iterator[tuple[fx.Node, tuple[int | None, ...]]]:
    """The inputs of an element-wise node, and where the dimensions of the state are in each."""
    rank = len(shape_of(node)) if is_tensor(node) else None
    added = _added_dimension(node)
    moved = ops.permutation(node)
    for part in ops.tensor_arguments(node):
        if added is not None:
            yield part, tuple(_without(dim, added) for dim in dims)
        elif len(shape_of(part)) == rank:
            yield part, dims if moved is None else _reordered(dims, moved)


def _reordered(dims: tuple[int | None, ...], moved: tuple[int, ...]) -> tuple[int | None, ...]:
    return tuple(None if dim is None else moved[dim] for dim in dims)


def _added_dimension(node: fx.Node) -> int | None:
    dim = ops.argument(node, 1, "dim") if ops.operation(node) == "unsqueeze" else None
    return dim % len(shape_of(node)) if isinstance(dim, int) else None


def _without(dim: int | None, added: int) -> int | None:
    """Where a dimension was before another one was put in; None for that one."""
    if dim is None or dim == added:
        return None
    return dim - int(dim > added)


def _moved(node: fx.Node, source: fx.Node, dims: tuple[int, ...]) -> tuple[int, ...] | None:
    """Where the state's dimensions are after an element-wise node; None where that is lost."""
    if not is_tensor(node) or not ops.is_elementwise(node) or len(shape_of(node)) != len(dims):
        return None
    order = ops.permutation(node)
    if order is None:
        return dims if shape_of(node) == shape_of(source) else None
    return tuple(dims[position] for position in order)


def _tells_channel(node: fx.Node, rank: int) -> int | None:
    name = ops.operation(node)
    if name in _CHANNEL_LAST:
        return rank - 1
    if name == "mean" and ops.argument(node, 2, "keepdim"):  # the statistic of a decomposed norm
        dims = ops.argument(node, 1, "dim")
        dim = dims[0] if isinstance(dims, list | tuple) and len(dims) == 1 else dims
        return dim % rank if isinstance(dim, int) and dim % rank in (1, rank - 1) else None
    if name in _CONVOLUTIONS:
        return max(rank - 1 - _spatial_dimensions(node), 0)
    if name in _CHANNEL_FIRST and rank > 1:
        return 1
    return _weighted_dimension(node, rank) if name in _WEIGHTINGS else None


def _spatial_dimensions(node: fx.Node) -> int:
    """Of a convolution; its input has a channel before them, and before that a batch or nothing."""
    digits = [int(letter) for letter in ops.operation(node) if letter.isdigit()]
    return digits[0] if digits else len(shape_of(ops.argument(node, 1, "weight"))) - 2


def _weighted_dimension(node: fx.Node, rank: int) -> int | None:
    """The one dimension along which a scale or bias of an affine map or layer scale varies."""
    for operand in ops.operands(node):
        sizes = shape_of(operand)
        varying = [rank - len(sizes) + i for i, size in enumerate(sizes) if size > 1]
        if len(varying) == 1 and varying[0] in (1, rank - 1) and ops.is_constant(operand):
            return varying[0]
    return None
