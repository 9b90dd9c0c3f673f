"""What a converted checkpoint holds, from its record and its new parameters alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from attnres_compile.checkpoint import pt, pt2
from attnres_compile.checkpoint import safetensors as st
from attnres_compile.checkpoint.huggingface import open_directory
from attnres_compile.checkpoint.onnx_extra import onnx_files
from attnres_compile.checkpoint.record import Record
from attnres_compile.checkpoint.sources import Source

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class SiteSummary:
    """One site with a query.

    Attributes:
        name: what it stands before.
        depth: residual additions before the read.
        sources: how many it attends over.
        query_norm: Euclidean; zero until it is trained.
        gain_change: the largest distance of a gain from one; None without gains.
        state: trained, untouched, or damaged.
    """

    name: str
    depth: int
    sources: int
    query_norm: float
    gain_change: float | None
    state: str


@dataclass(frozen=True)
class Summary:
    """What the sites of a converted checkpoint hold. Printing it gives a table."""

    record: Record
    streams: dict[str, tuple[SiteSummary, ...]]

    @property
    def trained(self) -> int:
        return sum(site.state == "trained" for sites in self.streams.values() for site in sites)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        plan = self.record.plan
        streams = [
            {
                "name": stream.name,
                "blocks": [len(block) for block in stream.blocks],
                "width": stream.width,
                "dtype": stream.dtype,
                "sites": [dataclasses.asdict(site) for site in self.streams[stream.name]],
            }
            for stream in plan.streams
        ]
        return {
            "converted": True,
            "model": plan.model,
            "names": self.record.names,
            "config": plan.config.to_json(),
            "new_parameters": plan.num_parameters,
            "trained_sites": self.trained,
            "streams": streams,
        }

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        plan = self.record.plan
        options = ", ".join(f"{k}={v}" for k, v in plan.config.to_json().items() if v is not None)
        sites = sum(len(each) for each in self.streams.values())
        parts: list[RenderableType] = [
            Text(
                f"{plan.model}: {sites} sites with a query, {self.trained} of them trained, "
                f"{plan.num_parameters:,} new parameters",
            ),
            Text(f"Options: {options}; names: {self.record.names}"),
        ]
        for stream in plan.streams:
            lengths = " + ".join(str(len(block)) for block in stream.blocks)
            table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
            table.add_column("site, before", overflow="fold")
            for heading in ("depth", "sources", "|query|", "gain - 1"):
                table.add_column(heading, justify="right", no_wrap=True)
            table.add_column("", no_wrap=True)
            for site in self.streams[stream.name]:
                table.add_row(*_cells(site), style="dim" if site.state == "untouched" else None)
            title = f"Stream {stream.name}: {lengths} sublayers, {stream.width} channels"
            parts += [Text(), Text(f"{title}, {stream.dtype}", style="bold"), table]
        return Group(*parts)


def summarize(record: Record, new: Mapping[str, Tensor]) -> Summary:
    """What the queries and gains of a checkpoint say of its sites."""
    streams = {
        stream.name: tuple(_site(site, new) for site in stream.sites if site.query_name is not None)
        for stream in record.plan.streams
    }
    return Summary(record, streams)


def contents(source: Source) -> dict[str, Any]:
    """Format, files and tensors of a checkpoint."""
    shapes = _shapes(source)
    parameters = sum(_numel(shape) for _, shape in shapes.values())
    dtypes = sorted({dtype for dtype, _ in shapes.values()})
    return {
        "checkpoint": source.path.name,
        "format": source.suffix or "Hugging Face directory",
        "tensors": len(shapes),
        "numbers": parameters,
        "dtypes": ", ".join(dtypes),
    }


def _shapes(source: Source) -> Mapping[str, tuple[str, tuple[int, ...]]]:
    if source.suffix == "":
        return open_directory(source.path).shapes()
    if source.suffix == ".safetensors":
        return st.read_header(source.path).shapes()
    if source.suffix == ".pt2":
        return pt.shapes_of(pt2.read_program(source.path).state_dict)
    if source.suffix == ".onnx":
        return dict(onnx_files().tensor_shapes(source.path))
    loaded = pt.read_pickle(source.path) if source.allow_pickle else pt.read_file(source.path)
    state = loaded.state_dict() if hasattr(loaded, "state_dict") else None
    return pt.shapes_of(state if state is not None else pt.state_dict_of(loaded, source.path))


def _numel(shape: tuple[int, ...]) -> int:
    size = 1
    for each in shape:
        size *= each
    return size


def _site(site: Any, new: Mapping[str, Tensor]) -> SiteSummary:
    query = new[site.query_name].float()
    gain = None if site.gain_name is None else new[site.gain_name].float()
    change = None if gain is None else float((gain - 1).abs().max())
    finite = bool(query.isfinite().all()) and (gain is None or bool(gain.isfinite().all()))
    touched = bool(query.any()) or bool(change)
    state = "DAMAGED" if not finite else "trained" if touched else "untouched"
    norm = float(query.norm())
    short = site.name.removeprefix("before_")
    return SiteSummary(short, site.depth, site.num_sources, norm, change, state)


def _cells(site: SiteSummary) -> list[str]:
    change = "" if site.gain_change is None else f"{site.gain_change:.3f}"
    return [
        site.name,
        str(site.depth),
        str(site.sources),
        f"{site.query_norm:.4f}",
        change,
        site.state,
    ]
