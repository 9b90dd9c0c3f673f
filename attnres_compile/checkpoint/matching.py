"""Does a layout belong to a model? If not: which site, what was expected, what was found."""

from __future__ import annotations

from torch import nn

from attnres_compile.call_shapes import make_up_call
from attnres_compile.errors import AttnResError, CheckpointError
from attnres_compile.plans import ConversionPlan, PlannedStream


def check_fits(model: nn.Module, plan: ConversionPlan, place: str) -> None:
    """Refuses a layout that was made for another model.

    What can be told without a capture is looked at first; the model is captured only to name what
    is different. What even that does not show, the first call of the converted model finds.

    Raises:
        CheckpointError: names the site, what was expected there and what was found.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    wanted = {stream.owner for stream in plan.streams}
    wanted |= {a.module_path for stream in plan.streams for a in stream.additions}
    missing = sorted(path for path in wanted if path not in modules)
    parameters = sum(p.numel() for p in model.parameters())
    if not missing and parameters == plan.base_parameters:
        return
    name = type(model).__name__
    difference = _difference(model, plan)
    if difference is not None:
        raise CheckpointError(f"{place} was made for another model than this {name}: {difference}.")
    if missing:
        raise CheckpointError(
            f"{place} was made for another model than this {name}, which has no {missing[0]}."
        )


def first_difference(expected: ConversionPlan, found: ConversionPlan) -> str | None:
    """The first thing in which two layouts differ, in words; None if they are the same.

    Example:
        >>> import torchvision, attnres_compile
        >>> plan = attnres_compile.plan(torchvision.models.vit_b_16())
        >>> first_difference(plan, plan) is None
        True
    """
    streams = {stream.name: stream for stream in found.streams}
    for stream in expected.streams:
        if stream.name not in streams:
            has = ", ".join(streams) or "none"
            return f"it should have the stream {stream.name}, found {has}"
        difference = _stream_difference(stream, streams[stream.name])
        if difference is not None:
            return difference
    return None


def _stream_difference(expected: PlannedStream, found: PlannedStream) -> str | None:
    if expected.width != found.width:
        first = next((s.name for s in expected.sites if s.query_name), expected.name)
        return f"site {first} expected {expected.width} channels, found {found.width}"
    sites = {site.name: site for site in found.sites}
    for site in expected.sites:
        if site.name not in sites:
            return (
                f"site {site.name} expected at depth {site.depth} of {len(expected.additions)}, "
                f"found none in a stream of depth {len(found.additions)}"
            )
        other = sites[site.name]
        if (site.depth, site.num_sources) != (other.depth, other.num_sources):
            return (
                f"site {site.name} expected at depth {site.depth} with {site.num_sources} sources, "
                f"found at depth {other.depth} with {other.num_sources}"
            )
    lengths = [[len(block) for block in stream.blocks] for stream in (expected, found)]
    if lengths[0] != lengths[1]:
        return f"stream {expected.name} expected blocks of {lengths[0]}, found {lengths[1]}"
    return None


def _difference(model: nn.Module, plan: ConversionPlan) -> str | None:
    from attnres_compile.planning import plan as make_plan

    device = next((p.device for p in model.parameters()), "cpu")
    try:
        call = ((), None) if plan.inputs is None else make_up_call(plan.inputs, device=device)
        return first_difference(plan, make_plan(model, *call, config=plan.config))
    except AttnResError as error:
        return f"its layout cannot be found again ({str(error).rstrip('.')})"
