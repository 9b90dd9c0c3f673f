"""The plan of a conversion: plain values that say what will be done, and why not more."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from attnres_compile.call_shapes import CallShapes
from attnres_compile.config import AttnResConfig
from attnres_compile.errors import NothingToConvertError
from attnres_compile.passes.classify_readers import Reader
from attnres_compile.passes.explain_additions import Explanation
from attnres_compile.passes.rewrite_residuals import MixLayout
from attnres_compile.passes.streams import Refusal

if TYPE_CHECKING:
    from rich.console import RenderableType

    from attnres_compile.explaining import Why


@dataclass(frozen=True)
class PlannedAddition:
    """A residual addition, by the identity that it has in every capture of the model.

    Attributes:
        module_path: path of the module the addition stands in, from the model's root.
        ordinal: which of that module's converted additions it is, counted from 0.
        source: its source line, ``file.py:123``.
    """

    module_path: str
    ordinal: int
    source: str


@dataclass(frozen=True)
class Sublayer:
    """A run of residual additions with no read between; its output is one value of the paper."""

    additions: tuple[PlannedAddition, ...]
    layer: str


@dataclass(frozen=True)
class Site:
    """A depth at which the stream is read.

    Attributes:
        name: what it stands before, unique in its owner.
        depth: how many residual additions precede the read; 0 is the root.
        state: its position among the stream's states, absorbed additions counted too.
        num_sources: what it attends over; 1 for the root and for a site that is left out, which are
            read as they are.
        module_path: path of the first module that reads it.
        readers: who reads it, and whether they see its scale.
        query_name, gain_name: names among the converted model's parameters; None without one.
        left_out_by: of a site that is left out, ``sites`` for the option or ``no-gradient``.
    """

    name: str
    depth: int
    state: int
    num_sources: int
    module_path: str
    readers: tuple[Reader, ...]
    query_name: str | None
    gain_name: str | None
    left_out_by: str = ""

    @property
    def left_out(self) -> bool:
        """Whether its readers get the plain sum: by the options, or for want of a gradient."""
        return self.state > 0 and self.query_name is None


LEFT_OUT = {
    "sites": " by the option sites",
    "no-gradient": " for want of a gradient",
    "": "",  # in a file of an earlier version
}
"""What to say after "left out", by the cause."""


@dataclass(frozen=True)
class PlannedStream:
    """A residual stream and its layout.

    Attributes:
        name: path of what all its additions stand in (``model.layers``).
        owner: path of the module whose forward is rewritten and that holds the new parameters.
        root: what the stream starts from, as ``module path`` of the operation that makes it.
        blocks: per block, its sublayers.
        sites: where it is read, by depth.
        width: number of channels D.
        channel_dim: -1 or 1.
        dtype: of the stream and of the new parameters, as ``float32``.
        methods: names of the functions through which the model's forward reached the additions.
        deltas: whether its sources are differences of states (`AttnResConfig.delta_sources`).
    """

    name: str
    owner: str
    root: str
    blocks: tuple[tuple[Sublayer, ...], ...]
    sites: tuple[Site, ...]
    width: int
    channel_dim: int
    dtype: str
    methods: tuple[str, ...]
    deltas: bool = False

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        return tuple(sublayer for block in self.blocks for sublayer in block)

    @property
    def additions(self) -> tuple[PlannedAddition, ...]:
        return tuple(addition for sublayer in self.sublayers for addition in sublayer.additions)

    def mix_layout(self, config: AttnResConfig) -> MixLayout:
        """The part of the plan that the rewrite of this stream needs."""
        return MixLayout(
            block_sublayers=tuple(len(block) for block in self.blocks),
            sums=config.aggregate == "sum",
            eps=config.eps,
            channel_dim=self.channel_dim,
        )

    @property
    def layers_path(self) -> str:
        """Path of the list that all layers stand in (``model.layers``); empty without one."""
        parents = {sublayer.layer.rpartition(".")[0] for sublayer in self.sublayers}
        return parents.pop() if len(parents) == 1 else ""

    @property
    def num_layers(self) -> int:
        return len(dict.fromkeys(sublayer.layer for sublayer in self.sublayers))

    @property
    def num_parameters(self) -> int:
        """New parameters: queries and gains."""
        names = [n for site in self.sites for n in (site.query_name, site.gain_name)]
        return self.width * sum(name is not None for name in names)

    @property
    def inference_values_per_token(self) -> int:
        """Numbers per token that stay alive beside the stream itself: the completed blocks.

        With delta sources, the state that the block in progress started from too.
        """
        return self.width * (len(self.blocks) + int(self.deltas))

    @property
    def training_values_per_token(self) -> int:
        """Numbers per token kept for the backward pass beyond the unconverted model's.

        Every partial sum that a site reads (the completed blocks among them; the states that they
        replace are no longer kept, the mixes are), and two float32 statistics per site and source.
        """
        mixes = [site for site in self.sites if site.num_sources > 1]
        return self.width * len(mixes) + 2 * sum(site.num_sources for site in mixes)


@dataclass(frozen=True)
class ConversionPlan:
    """What `convert` will do to a model. Printing it gives a table to decide from.

    Attributes:
        model: the model's class name.
        config: the options it was made with.
        streams: what will be converted.
        refusals: what looks like a residual addition and will not be, each with its reason.
        base_parameters: how many parameters the model has without the new ones.
        inputs: shapes of the example inputs, from `describe_call`; None where they were inferred
            or have no such description.
        explanations: of every addition of the model, for `why`; not written to files.
    """

    model: str
    config: AttnResConfig
    streams: tuple[PlannedStream, ...]
    refusals: tuple[Refusal, ...]
    base_parameters: int
    inputs: CallShapes | None = field(default=None, compare=False, repr=False)
    explanations: tuple[Explanation, ...] = field(default=(), compare=False, repr=False)

    @property
    def num_residual_additions(self) -> int:
        """Addition nodes that are converted."""
        return sum(len(stream.additions) for stream in self.streams)

    @property
    def num_parameters(self) -> int:
        """New parameters of all streams."""
        return sum(stream.num_parameters for stream in self.streams)

    def to_json(self) -> dict[str, Any]:
        """The plan as a dictionary of JSON values."""
        data = dataclasses.asdict(dataclasses.replace(self, explanations=()))
        del data["explanations"]
        for refusal in data["refusals"]:
            del refusal["node"]  # a name in a graph that nobody else has
        return {**data, "config": self.config.to_json()}

    def why(self, path: str = "") -> Why:
        """What the additions under a module path are, or which rule says that one is none.

        Args:
            path: as ``model.layers.3``, or a pattern as in ``AttnResConfig.sites``; all without.

        Raises:
            InputError: no addition was traced there, or the plan was read from a file.

        Example:
            >>> import attnres_compile, torchvision
            >>> print(attnres_compile.plan(torchvision.models.resnet18()).why("layer1.0"))
            layer1.0, resnet.py:102: refused [post-activation]: post-activation: the carrier \
passes an activation between residual additions, so block sums do not add up to it
        """
        from attnres_compile.explaining import select_explanations

        return select_explanations(self.explanations, path)

    def require_streams(self) -> None:
        """Raises NothingToConvertError, with its reasons, for a plan without streams."""
        if self.streams:
            return
        why = self.explain_refusals() or "it has no residual addition x + f(x)"
        raise NothingToConvertError(f"{self.model} has no residual stream to convert: {why}.")

    def explain_refusals(self) -> str:
        """One clause per reason: how many additions, why, and where the first one stands."""
        counts = Counter(refusal.kind for refusal in self.refusals)
        first = {refusal.kind: refusal for refusal in reversed(self.refusals)}
        return "; ".join(
            f"{count} x {first[kind].reason} (first at {place(first[kind])})"
            for kind, count in counts.most_common()
        )

    def __rich__(self) -> RenderableType:
        from attnres_compile.rendering import render_plan

        return render_plan(self)

    def __str__(self) -> str:
        from attnres_compile.rendering import to_text

        return to_text(self)


def place(refusal: Refusal) -> str:
    """Module path and source line of a refusal, for messages."""
    where = refusal.module_path or "the model itself"
    return f"{where}, {refusal.source}" if refusal.source else where
