"""What the sites of a converted model attend over: depth attention of one call, and its picture."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from attnres_compile.errors import AttnResError, InputError
from attnres_compile.inputs import infer_inputs
from attnres_compile.module import AttnRes, owners
from attnres_compile.plans import ConversionPlan, PlannedStream, Site

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FORMATS = (".png", ".svg")
_TALLEST = 16.0  # inches that the rows of a picture may take
_ROW = 0.22  # inches a row takes with a label on each
_MOST_NUMBERS = 400  # cells up to which each one shows its number


@dataclass(frozen=True, eq=False)
class DepthAttention:
    """The weights alpha of every site with several sources, in one call.

    Attributes:
        weights: by site, [sources, *tokens] in float32 (float64 for a float64 stream); they sum to
            one over the sources. A site is named like its query without ``.query``.
        sources: by site, what the rows are: ``root``, ``block 1`` ..., and ``partial`` for the sum
            of the block in progress.
        streams: by site, the name of its residual stream.
    """

    weights: dict[str, Tensor]
    sources: dict[str, tuple[str, ...]]
    streams: dict[str, str]

    def mean(self) -> dict[str, Tensor]:
        """By site, the weights [sources] averaged over all tokens, padding included."""
        return {name: weights.flatten(1).mean(1) for name, weights in self.weights.items()}

    def entropy(self) -> dict[str, float]:
        """By site, the entropy in nats, averaged over tokens.

        0 means that every token takes a single source, ``log(sources)`` that all weigh alike.
        """
        return {
            name: float(torch.special.entr(weights).sum(0).mean())
            for name, weights in self.weights.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Means and entropies, without the weights of single tokens, as JSON values."""
        means, entropies = self.mean(), self.entropy()
        sites = [
            {
                "name": name,
                "stream": self.streams[name],
                "sources": list(self.sources[name]),
                "mean": means[name].tolist(),
                "entropy": entropies[name],
            }
            for name in self.weights
        ]
        return {"sites": sites}

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws mean weights as a heat map, sites by sources, one panel per stream.

        Args:
            path: the picture, ``.png`` or ``.svg``. It is written whole or not at all.

        Raises:
            InputError: another suffix.
            AttnResError: matplotlib is not installed.
        """
        path = Path(path)
        if path.suffix.lower() not in _FORMATS:
            raise InputError(f"{path.name}: a picture must end in {' or '.join(_FORMATS)}.")
        figure = _draw(self)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            figure.savefig(temporary, format=path.suffix.lower()[1:], dpi=150)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def depth_attention(
    converted: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> DepthAttention:
    """The depth attention of one call of a converted model.

    The call is made without gradients, in the model's present mode; parameters and buffers stay as
    they are. Of a site that runs several times in the call (a looped stream) the first run is kept.
    A model with ``executor="attnres"`` is run node by node here, which fused kernels do not show.

    Args:
        converted: what `convert` returned, or that inside of a wrapper.
        args, kwargs: inputs of the call; inferred where the model says what it takes.

    Raises:
        InputError: the model was not converted, lies on the meta device, or ran no site.

    Example:
        >>> import attnres_compile, torchvision
        >>> model = attnres_compile.convert(torchvision.models.vit_b_16().eval())
        >>> attention = attnres_compile.depth_attention(model)
        >>> attention.sources["encoder.attnres.before_layers_encoder_layer_1_ln_2"]
        ('root', 'block 1', 'partial')
    """
    converted = unwrapped(converted)
    sites = _planned_sites(converted)
    parameters = attnres_parameters(converted)
    queries = {name: parameters[f"{name}.query"] for name in sites}
    if any(query.is_meta for query in queries.values()):
        raise InputError(
            f"the weights of {type(converted).__name__} lie on the meta device, where nothing is "
            "computed; load real weights first."
        )
    if not args and not kwargs:
        args, kwargs = infer_inputs(converted)
    with torch.no_grad(), _MixRecorder() as recorder:
        _runnable(converted)(*args, **(kwargs or {}))
    logits = {name: recorder.logits.get(query.data_ptr()) for name, query in queries.items()}
    weights = {n: torch.softmax(each, dim=0) for n, each in logits.items() if each is not None}
    if not weights:
        streams = ", ".join(dict.fromkeys(stream.name for stream, _ in sites.values()))
        raise InputError(
            f"this call of {type(converted).__name__} ran none of its sites; pass inputs that "
            f"reach its residual streams ({streams})."
        )
    return DepthAttention(
        weights=weights,
        sources={name: source_labels(*sites[name]) for name in weights},
        streams={name: sites[name][0].name for name in weights},
    )


def attnres_parameters(converted: nn.Module) -> dict[str, nn.Parameter]:
    """The queries and gains of a converted model, or GraphModule, by name.

    Raises:
        InputError: the model was not converted.
    """
    found: dict[str, nn.Parameter] = {}
    for path, owner in owners(converted):
        attnres = owner.attnres
        assert isinstance(attnres, AttnRes)
        prefix = f"{path}.attnres" if path else "attnres"
        found.update(attnres.named_parameters(prefix))
    for path, plan in plans_in(converted):
        sites = [site for stream in plan.streams for site in stream.sites]
        names = [name for site in sites for name in (site.query_name, site.gain_name) if name]
        found.update({_join(path, n): converted.get_parameter(_join(path, n)) for n in names})
    if not found:
        raise InputError(
            f"{type(converted).__name__} has no Attention Residuals of attnres_compile; pass what "
            "attnres_compile.convert(model) returned."
        )
    return found


def source_labels(stream: PlannedStream, site: Site) -> tuple[str, ...]:
    """What a site attends over, in the order of its weights."""
    completed = additions = 0
    for block in stream.blocks:
        additions += sum(len(sublayer.additions) for sublayer in block)
        completed += int(additions <= site.depth)
    labels = ("root", *(f"block {number}" for number in range(1, completed + 1)))
    return labels if site.num_sources == len(labels) else (*labels, "partial")


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile(module)`` wraps, or the module itself."""
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a converted torch.nn.Module, not {type(model).__name__}.")
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner


class _MixRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the logits of the first ``attnres::mix`` of every query, by the query's address."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.logits: dict[int, Tensor] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Dynamo compiles as usual, and what its graphs execute eagerly is seen here."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if func is torch.ops.attnres.mix.default:
            query, logits = args[1], outputs[1]
            self.logits.setdefault(query.data_ptr(), logits)
        return outputs


def _runnable(converted: nn.Module) -> nn.Module:
    """The model, or a copy that shares its parameters where running it would not do.

    A copy runs node by node whatever the executor, and takes the change of buffers in train mode.
    """
    parts = [owner.attnres for _, owner in owners(converted)]
    lowered = any(part.executor != "eager" for part in parts if isinstance(part, AttnRes))
    if not lowered and not any(module.training for module in converted.modules()):
        return converted
    twin = copy.deepcopy(converted, {id(p): p for p in converted.parameters()})
    for _, owner in owners(twin):
        assert isinstance(owner.attnres, AttnRes)
        owner.attnres.executor = "eager"
    return twin


def plans_in(model: nn.Module) -> list[tuple[str, ConversionPlan]]:
    """The plans of the converted models in a module, with the models' paths."""
    found = [(path, vars(module).get("plan")) for path, module in model.named_modules()]
    return [(path, plan) for path, plan in found if isinstance(plan, ConversionPlan)]


def _planned_sites(model: nn.Module) -> dict[str, tuple[PlannedStream, Site]]:
    """The sites with a query by name, by stream and depth."""
    sites = {
        _join(path, site.query_name.removesuffix(".query")): (stream, site)
        for path, plan in plans_in(model)
        for stream in plan.streams
        for site in stream.sites
        if site.query_name is not None
    }
    if not sites:
        raise InputError(
            f"{type(model).__name__} carries no conversion plan; pass the whole model that "
            "attnres_compile.convert(model) returned."
        )
    return sites


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _draw(attention: DepthAttention) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise AttnResError(
            "drawing depth attention needs matplotlib: pip install 'attnres-compile[viz]'"
        ) from error
    panels: dict[str, list[str]] = {}
    for name, stream in attention.streams.items():
        panels.setdefault(stream, []).append(name)
    rows = [len(names) for names in panels.values()]
    row_height = min(_ROW, _TALLEST / sum(rows))
    most_columns = max(len(_columns(attention, names)) for names in panels.values())
    figure = Figure(
        figsize=(5.5 + 0.45 * most_columns, sum(rows) * row_height + 1.3 * len(rows)),
        layout="constrained",
    )
    axes = figure.subplots(len(rows), squeeze=False, gridspec_kw={"height_ratios": rows})
    for axis, (stream, names) in zip(axes[:, 0], panels.items(), strict=True):
        _draw_panel(axis, attention, stream, names, every=math.ceil(_ROW / row_height))
    shading = axes[0, 0].images[0]
    figure.colorbar(shading, ax=axes, label="weight, mean over tokens", shrink=0.6, aspect=30)
    return figure


def _draw_panel(
    axis: Axes, attention: DepthAttention, stream: str, names: list[str], *, every: int
) -> None:
    means = attention.mean()
    columns = _columns(attention, names)
    cells = torch.full((len(names), len(columns)), math.nan)  # nan: not a source there
    for row, name in enumerate(names):
        places = [columns.index(label) for label in attention.sources[name]]
        cells[row, places] = means[name].float().cpu()
    axis.set_facecolor("lightgrey")
    axis.imshow(cells.numpy(), cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    axis.set_title(stream, fontsize=9)
    axis.set_ylabel("read by", fontsize=8)
    axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=7)
    shown = range(0, len(names), every)
    axis.set_yticks(shown, [_short(names[row]) for row in shown], fontsize=7)
    if cells.numel() > _MOST_NUMBERS:
        return
    for row, column in cells.isfinite().nonzero().tolist():
        value = float(cells[row, column])
        color = "white" if value > 0.6 else "black"
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6, color=color)


def _columns(attention: DepthAttention, names: list[str]) -> list[str]:
    """All sources of some sites in order, the partial sum last."""
    labels = dict.fromkeys(label for name in names for label in attention.sources[name])
    return sorted(labels, key=lambda label: label == "partial")


def _short(name: str) -> str:
    """``layers_3_mlp_norm`` for ``model.attnres.before_layers_3_mlp_norm``."""
    return name.rpartition("attnres.")[2].removeprefix("before_")
