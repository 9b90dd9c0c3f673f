"""What a saved file says of its conversion: the plan as JSON, next to the tensors it describes.

A record is as untrusted as the file around it: everything is checked, and every size in it is
believed only as far as there are tensors of that size.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

import attnres_compile
from attnres_compile.config import AttnResConfig
from attnres_compile.errors import AttnResError, CheckpointError
from attnres_compile.passes.classify_readers import Reader
from attnres_compile.passes.streams import Refusal
from attnres_compile.plans import (
    LEFT_OUT,
    ConversionPlan,
    PlannedAddition,
    PlannedStream,
    Site,
    Sublayer,
)

KEY = "attnres_compile"
"""Under this key a record stands in metadata and in state dict files."""

VERSION = 1
NAMINGS = ("native", "kimi", "fla")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Record:
    """How the new parameters of a file are laid out.

    Attributes:
        plan: what was converted.
        names: whose parameter names the file uses: native, kimi or fla.
        extras: names of tensors that belong to the layout and that no site of ours uses.
    """

    plan: ConversionPlan
    names: str = "native"
    extras: tuple[str, ...] = ()

    def encode(self) -> str:
        """As one line of JSON."""
        data = {
            "version": VERSION,
            "package": attnres_compile.__version__,
            "names": self.names,
            "extras": list(self.extras),
            "plan": self.plan.to_json(),
        }
        return json.dumps(data, separators=(",", ":"))

    @staticmethod
    def decode(text: str, place: str) -> Record:
        """From `encode`'s JSON; `place` names the file in messages.

        Raises:
            CheckpointError: the record is damaged, or from a later version.
        """
        data = parse_json(text, f"{place}: the record of its Attention Residuals")
        if not isinstance(data, dict):
            raise CheckpointError(f"{place}: the record of its Attention Residuals is no object.")
        version = data.get("version")
        if version != VERSION:
            raise CheckpointError(
                f"{place} has the record format {version!r} (written by attnres_compile "
                f"{data.get('package')!r}) and this version reads {VERSION}; use a version of "
                "attnres_compile that matches."
            )
        return _checked(lambda: _record(data), place)


@dataclass(frozen=True)
class NewTensor:
    """A query or gain that a plan asks for."""

    name: str
    site: str
    width: int
    dtype: str


def new_tensors(plan: ConversionPlan) -> dict[str, NewTensor]:
    """The queries and gains of a plan, by name, in the order of streams and sites."""
    return {
        name: NewTensor(name, f"{stream.owner}.{site.name}".lstrip("."), stream.width, stream.dtype)
        for stream in plan.streams
        for site in stream.sites
        for name in (site.query_name, site.gain_name)
        if name is not None
    }


def initial_tensors(plan: ConversionPlan) -> dict[str, torch.Tensor]:
    """Zero queries and gains of one, as every conversion starts."""
    return {
        name: (torch.zeros if name.endswith(".query") else torch.ones)(
            new.width, dtype=getattr(torch, new.dtype)
        )
        for name, new in new_tensors(plan).items()
    }


def with_dtypes(plan: ConversionPlan, tensors: Mapping[str, torch.Tensor]) -> ConversionPlan:
    """The plan with the dtypes that its parameters have now (a model may have been cast)."""
    streams = []
    for stream in plan.streams:
        names = [site.query_name for site in stream.sites if site.query_name is not None]
        dtype = str(tensors[names[0]].dtype).removeprefix("torch.") if names else stream.dtype
        streams.append(dataclasses.replace(stream, dtype=dtype))
    return dataclasses.replace(plan, streams=tuple(streams))


def check_new_tensors(
    plan: ConversionPlan, found: Mapping[str, tuple[str, tuple[int, ...]]], place: str
) -> None:
    """Compares names, shapes and dtypes of new tensors, as found in a file, with the plan.

    Raises:
        CheckpointError: names the site, what was expected and what was found.
    """
    expected = new_tensors(plan)
    for name, new in expected.items():
        if name not in found:
            raise CheckpointError(
                f"{place}: site {new.site} expects the tensor {name} [{new.width}], found none."
            )
        dtype, shape = found[name]
        if shape != (new.width,) or dtype != new.dtype:
            raise CheckpointError(
                f"{place}: site {new.site} expects {name} of shape [{new.width}] in {new.dtype}, "
                f"found {list(shape)} in {dtype}."
            )
    surplus = [name for name in found if name not in expected]
    if surplus:
        raise CheckpointError(
            f"{place}: its layout has no site for {surplus[0]}, which it holds nevertheless; the "
            "file was put together from two."
        )


def check_finite(tensors: Mapping[str, torch.Tensor], place: str) -> None:
    """Refuses queries and gains that are not numbers.

    Raises:
        CheckpointError: names the tensor.
    """
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{place}: {name} holds values that are not finite; the model diverged or the file "
                "is damaged."
            )


def as_toml(config: AttnResConfig) -> str:
    """The resolved options for ``--config``; JSON's way to write these values is TOML's too.

    Example:
        >>> print(as_toml(AttnResConfig(num_blocks=4)).splitlines()[1])
        num_blocks = 4
    """
    lines = [f"{k} = {_toml(v)}\n" for k, v in config.to_json().items() if v is not None]
    return "# the options of this conversion, for --config\n" + "".join(lines)


def _toml(value: object) -> str:
    if not isinstance(value, dict):
        return json.dumps(value)
    pairs = (f"{json.dumps(key)} = {json.dumps(each)}" for key, each in value.items())
    return f"{{ {', '.join(pairs)} }}"


def parse_json(text: str | bytes, what: str) -> Any:
    """JSON, or one sentence.

    Raises:
        CheckpointError: `what` is no JSON, or nested without end.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is no valid JSON ({error}).") from error


def _checked(make: Callable[[], Value], place: str) -> Value:
    try:
        return make()
    except AttnResError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{place}: the record of its Attention Residuals is damaged ({why})."
        ) from error


def _record(data: dict[str, Any]) -> Record:
    names, extras = data["names"], data["extras"]
    if names not in NAMINGS:
        raise ValueError(f"names {names!r}")
    return Record(_plan(data["plan"]), names, tuple(_text(name) for name in extras))


def _plan(data: dict[str, Any]) -> ConversionPlan:
    return ConversionPlan(
        model=_text(data["model"]),
        config=config_from_json(data["config"]),
        streams=tuple(_stream(stream) for stream in data["streams"]),
        refusals=tuple(Refusal(**_texts(refusal)) for refusal in data["refusals"]),
        base_parameters=_number(data["base_parameters"]),
        inputs=data.get("inputs"),
    )


def config_from_json(data: Mapping[str, Any]) -> AttnResConfig:
    """The options of a saved conversion.

    Raises:
        ConfigError: a value is out of range.
        ValueError: an option of another version, that this one does not know.
    """
    known = {each.name for each in dataclasses.fields(AttnResConfig)}
    unknown = sorted(set(data) - known)
    if unknown:
        raise ValueError(f"it has the option {unknown[0]!r}, which this version does not know")
    return AttnResConfig(**data)


def _stream(data: dict[str, Any]) -> PlannedStream:
    dtype = _text(data["dtype"])
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype {dtype!r}")
    if data["channel_dim"] not in (-1, 1):
        raise ValueError(f"channel_dim {data['channel_dim']!r}")
    return PlannedStream(
        name=_text(data["name"]),
        owner=_text(data["owner"]),
        root=_text(data["root"]),
        blocks=tuple(tuple(_sublayer(each) for each in block) for block in data["blocks"]),
        sites=tuple(_site(site) for site in data["sites"]),
        width=_number(data["width"]),
        channel_dim=data["channel_dim"],
        dtype=dtype,
        methods=tuple(_text(name) for name in data["methods"]),
        deltas=bool(data.get("deltas", False)),
    )


def _sublayer(data: dict[str, Any]) -> Sublayer:
    additions = tuple(
        PlannedAddition(_text(a["module_path"]), _number(a["ordinal"]), _text(a["source"]))
        for a in data["additions"]
    )
    return Sublayer(additions, _text(data["layer"]))


def _site(data: dict[str, Any]) -> Site:
    readers = tuple(
        Reader(
            _text(r["module_path"]), _text(r["operation"]), bool(r["scale_invariant"]), r["source"]
        )
        for r in data["readers"]
    )
    query, gain = data["query_name"], data["gain_name"]
    cause = data.get("left_out_by", "")
    if cause not in LEFT_OUT:
        raise ValueError(f"left_out_by {cause!r}")
    return Site(
        name=_text(data["name"]),
        depth=_number(data["depth"]),
        state=_number(data["state"]),
        num_sources=_number(data["num_sources"]),
        module_path=_text(data["module_path"]),
        readers=readers,
        query_name=None if query is None else _text(query),
        gain_name=None if gain is None else _text(gain),
        left_out_by=_text(cause),
    )


def _texts(data: dict[str, Any]) -> dict[str, str]:
    return {name: _text(value) for name, value in data.items()}


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"{value!r} is no count")
    return value
