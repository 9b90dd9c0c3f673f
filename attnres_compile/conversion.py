"""Carry a plan out: a model of the same class whose owners run with Attention Residuals."""

from __future__ import annotations

import copy
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from attnres_compile.config import AttnResConfig
from attnres_compile.containers import asks_for_children
from attnres_compile.errors import ConfigError, InputError
from attnres_compile.graph_modules import convert_exported, convert_graph_module, is_rewritten
from attnres_compile.huggingface import mark_config, restore_config
from attnres_compile.layout import OwnerLayout, StreamLayout
from attnres_compile.module import (
    AttnRes,
    AttnResSite,
    Guard,
    Owner,
    is_converted,
    leave_class,
    owners,
)
from attnres_compile.owner_classes import become_guard, become_owner
from attnres_compile.planning import check_call, check_model
from attnres_compile.planning import plan as make_plan
from attnres_compile.plans import ConversionPlan, PlannedStream
from attnres_compile.stream_plans import common_path, stream_dtype

Model = TypeVar("Model", bound=nn.Module)
Executor = Literal["eager", "attnres"]


def convert(
    model: Model,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    config: AttnResConfig | None = None,
    plan: ConversionPlan | None = None,
    executor: Executor = "eager",
) -> Model:
    """Gives a model Block Attention Residuals, with new learnable parameters.

    Args:
        model: any module that can be captured whole, or a GraphModule or ExportedProgram. It is
            left as it is; the converted model shares its parameters and its modules below the
            owners of the streams (deepcopy it first for independence).
        args, kwargs: example inputs of one call; inferred where the model says what it takes.
        config: the options. Not together with `plan`.
        plan: a plan made before, for this model.
        executor: how the rewritten graph runs: as PyTorch operators one by one, or through the
            ``attnres`` backend. Not for a GraphModule or ExportedProgram, which is a graph itself.

    Returns:
        A model of the same class. ``converted.plan`` is what was done; ``<owner>.attnres`` holds
        one query [D] (zeros) and one key gain [D] (ones) per site. With ``aggregate="sum"`` its
        outputs equal the model's until the queries are trained.

    Raises:
        NothingToConvertError: no residual stream can be converted; says why.
        InputError, CaptureError, ConfigError, AlreadyConvertedError: see `plan`.

    Example:
        >>> import torchvision
        >>> converted = convert(torchvision.models.vit_b_16())
        >>> type(converted).__name__, len(converted.plan.streams[0].sites)
        ('VisionTransformer', 25)
    """
    if executor not in ("eager", "attnres"):
        raise ConfigError(f"executor must be 'eager' or 'attnres', not {executor!r}.")
    if plan is not None and config is not None:
        raise ConfigError("a plan has its config already; pass either plan or config.")
    check_call(args, kwargs, config)
    if isinstance(model, _GRAPHS):
        if executor != "eager":
            raise ConfigError(
                f"a converted {type(model).__name__} is a graph to be run, compiled or saved by "
                f"you; executor={executor!r} is for other models."
            )
        options = plan.config if plan is not None else config or AttnResConfig()
        converted: Model = _convert_graph(model, args, kwargs, options)
        return converted
    if plan is None:
        plan = make_plan(model, args, kwargs, config=config)
    check_model(model)
    plan.require_streams()
    return _carry_out(model, plan, executor)


_GRAPHS = (torch.export.ExportedProgram, torch.fx.GraphModule)


def _convert_graph(
    graph: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, config: AttnResConfig
) -> Any:
    if isinstance(graph, torch.fx.GraphModule):
        return convert_graph_module(graph, args, kwargs, config)
    return convert_exported(graph, config)


def strip(converted: Model) -> Model:
    """The model without its Attention Residuals: original class, base weights as they are now.

    Args:
        converted: what `convert` returned, trained or not. It is left as it is; the result shares
            its base parameters.

    Raises:
        InputError: the model has no Attention Residuals of ours.

    Warns:
        UserWarning: when queries were trained, since the result does not compute what the
            converted model does.

    Example:
        >>> import torchvision
        >>> model = torchvision.models.vit_b_16()
        >>> strip(convert(model)).state_dict().keys() == model.state_dict().keys()
        True
    """
    if isinstance(converted, _GRAPHS) and is_rewritten(converted.graph):
        raise InputError(
            f"a converted {type(converted).__name__} cannot be stripped, since its additions are "
            "gone; keep the one that it was made from."
        )
    if isinstance(converted, torch.export.ExportedProgram) or not is_converted(converted):
        raise InputError(
            f"{type(converted).__name__} was not converted by attnres_compile; nothing to strip."
        )
    trained = [name for name, q in queries(converted) if q.device.type != "meta" and bool(q.any())]
    if trained:
        warnings.warn(
            f"{len(trained)} queries are not zero (first: {trained[0]}); the stripped model "
            "computes plain residual sums, not what the converted model computes.",
            stacklevel=2,
        )
    paths = [
        path for path, module in converted.named_modules() if isinstance(module, Owner | Guard)
    ]
    copies = _copy_paths(converted, paths)
    for path in paths:
        module = copies[path]
        leave_class(module)
        module._modules.pop("attnres", None)
    plain = copies[""]
    plain.__dict__.pop("plan", None)
    restore_config(plain)
    return plain  # type: ignore[return-value]


def queries(converted: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Names and values of all queries."""
    for path, owner in owners(converted):
        for name, parameter in owner.attnres.named_parameters():
            if name.endswith(".query"):
                yield f"{path}.attnres.{name}".lstrip("."), parameter


def _carry_out(model: Model, plan: ConversionPlan, executor: Executor) -> Model:
    if hasattr(model, "plan"):
        raise InputError(
            f"{type(model).__name__} has an attribute named 'plan' already, where a converted "
            "model keeps its plan; rename it."
        )
    by_owner: dict[str, list[PlannedStream]] = defaultdict(list)
    for stream in plan.streams:
        by_owner[stream.owner].append(stream)
    guarded = _containers_between(model, plan)
    copies = _copy_paths(model, [*by_owner, *guarded])
    for path in guarded:
        become_guard(copies[path])
    for path, streams in by_owner.items():
        if hasattr(copies[path], "attnres"):
            raise InputError(f"{path or 'the model'} has a child named 'attnres' already.")
        attnres = _make_attnres(copies[path], path, streams, plan.config, executor)
        become_owner(copies[path], attnres)
    converted = copies[""]
    converted.__dict__["plan"] = plan
    mark_config(converted)
    return converted  # type: ignore[return-value]


def _copy_paths(model: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """Shallow copies of the modules at these paths and of all on the way to them, linked up."""
    wanted = {""}
    for path in paths:
        parts = path.split(".") if path else []
        wanted.update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    copied: dict[int, nn.Module] = {}
    result = {}
    for path in sorted(wanted):
        original = model.get_submodule(path)
        if id(original) not in copied:
            copied[id(original)] = _shallow_copy(original, path)
        result[path] = copied[id(original)]
    for module in copied.values():
        _relink(module, copied)
    _check_no_other_holder(model, copied)
    return result


def _shallow_copy(module: nn.Module, path: str) -> nn.Module:
    if "forward" in vars(module):
        raise InputError(
            f"forward of {path or 'the model'} was replaced on the instance (by accelerate's "
            "hooks or the like); convert the model before that is done."
        )
    if is_parametrized(module):
        raise InputError(
            f"{path or 'the model'} has a parametrized weight; convert the model before it is "
            "parametrized, or take that off (torch.nn.utils.parametrize.remove_parametrizations)."
        )
    duplicate = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, dict | set) and name.startswith("_"):
            duplicate.__dict__[name] = copy.copy(value)
    return duplicate


def _relink(module: nn.Module, copied: dict[int, nn.Module]) -> None:
    for name, child in module._modules.items():
        if id(child) in copied:
            module._modules[name] = copied[id(child)]
    for name, value in list(vars(module).items()):
        if isinstance(value, nn.Module) and id(value) in copied:
            module.__dict__[name] = copied[id(value)]


def _check_no_other_holder(model: nn.Module, copied: dict[int, nn.Module]) -> None:
    """Nothing outside the copies may still lead to an original: it would run unconverted."""
    for path, module in model.named_modules():
        if id(module) in copied:
            continue
        for name, child in module.named_children():
            if id(child) in copied:
                raise InputError(
                    f"{path}.{name} is also a part of the converted path; a module that is held "
                    "in two places on different levels cannot be converted."
                )


def _containers_between(model: nn.Module, plan: ConversionPlan) -> list[str]:
    """Containers between owners and layers: called on their own they would run unconverted."""
    found: dict[str, None] = {}
    for stream in plan.streams:
        parts = common_path([a.module_path for a in stream.additions]).split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            below_owner = path != stream.owner and path.startswith(stream.owner)
            if below_owner and _runs_layers(model.get_submodule(path)):
                found[path] = None
    return list(found)


def _runs_layers(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) or asks_for_children(type(module))


def _make_attnres(
    owner: nn.Module,
    path: str,
    streams: list[PlannedStream],
    config: AttnResConfig,
    executor: Executor,
) -> AttnRes:
    device = next((p.device for p in owner.parameters()), torch.device("cpu"))
    sites = {}
    for stream in streams:
        for site in stream.sites:
            if site.query_name is not None:
                sites[site.name] = AttnResSite(
                    stream.width,
                    gain=site.gain_name is not None,
                    dtype=stream_dtype(stream),
                    device=device,
                )
    attnres = AttnRes(_owner_layout(streams, config, path), sites, executor)
    return attnres.train(owner.training)


def _owner_layout(streams: list[PlannedStream], config: AttnResConfig, path: str) -> OwnerLayout:
    layers = {_below(a.module_path, path) for s in streams for a in s.additions} - {""}
    above = {".".join(p.split(".")[:end]) for p in layers for end in range(1, p.count(".") + 1)}
    methods = {name for stream in streams for name in stream.methods}
    return OwnerLayout(
        streams=tuple(_stream_layout(stream, config, path) for stream in streams),
        methods=tuple(sorted(methods)),
        layers=tuple(sorted(layers | above)),
        delta_sources=config.delta_sources,
    )


def _stream_layout(stream: PlannedStream, config: AttnResConfig, owner: str) -> StreamLayout:
    return StreamLayout(
        name=stream.name,
        additions=tuple((_below(a.module_path, owner), a.ordinal) for a in stream.additions),
        sites=tuple(site.state for site in stream.sites if site.query_name is not None),
        gains=config.key_gain,
        mix=stream.mix_layout(config),
        left_out=tuple(site.state for site in stream.sites if site.left_out),
    )


def _below(path: str, owner: str) -> str:
    return re.sub(rf"^{re.escape(owner)}(\.|$)", "", path) if owner else path
