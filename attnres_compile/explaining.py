"""What a plan says of any addition: recognised as what, or which rule decided that it is none."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from attnres_compile.errors import InputError
from attnres_compile.passes.dataflow import Dataflow
from attnres_compile.passes.explain_additions import Explanation, explain_additions
from attnres_compile.passes.streams import Refusal, ResidualStream
from attnres_compile.path_patterns import matcher
from attnres_compile.plans import LEFT_OUT, PlannedStream, Site

_TITLES = {
    "residual": "converted",
    "absorbed": "absorbed",
    "refused": "refused",
    "none": "no residual addition",
}


@dataclass(frozen=True)
class Why:
    """The additions under a module path; printing it gives a line for each.

    Attributes:
        path: what was asked for.
        explanations: of every addition there, in the order in which the model runs them.
    """

    path: str
    explanations: tuple[Explanation, ...]

    def to_json(self) -> dict[str, Any]:
        """As a dictionary of JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return "\n".join(_line(each) for each in self.explanations)


def select_explanations(known: Sequence[Explanation], path: str) -> Why:
    """The explanations under a path or pattern.

    Raises:
        InputError: there are none, with the nearest paths where there are some.
    """
    if not known:
        raise InputError(
            "this plan does not say why: it was read from a file, or its model has no addition of "
            "two tensors. A plan that attnres_compile.plan(model) makes does."
        )
    paths = [each.module_path for each in known]
    matches = matcher(path, paths) if path else (lambda _: True)
    found = tuple(each for each in known if matches(each.module_path))
    if not found:
        near = difflib.get_close_matches(path, dict.fromkeys(paths), n=4, cutoff=0.3)
        others = [each or "the model itself" for each in near or list(dict.fromkeys(paths))[:4]]
        raise InputError(
            f"no addition was traced in {path!r}; there are some in {', '.join(others)}."
        )
    return Why(path, found)


def explain_plan(
    view: Dataflow,
    planned: Iterable[tuple[ResidualStream, PlannedStream]],
    unusable: Iterable[tuple[ResidualStream, Refusal]],
    refusals: Iterable[Refusal],
) -> tuple[Explanation, ...]:
    """An explanation of every addition of a captured graph.

    Args:
        view: of the graph.
        planned: the streams that will be rewritten, and as what.
        unusable: streams that were found and are refused as a whole.
        refusals: of additions that are in none of these streams.
    """
    converted, refused, others = list(planned), list(unusable), list(refusals)
    everything = [*(stream for stream, _ in converted), *(stream for stream, _ in refused)]
    told = explain_additions(view, everything, others)
    for stream, plan in converted:
        told.update(_as_planned(stream, plan, told))
    for stream, refusal in refused:
        for state in stream.states[1:]:
            if state.addition is None:  # made by what alters the carrier
                continue
            told[state.node] = dataclasses.replace(
                told[state.node], verdict="refused", rule=refusal.kind, reason=refusal.reason
            )
    found = dict.fromkeys(told.values())
    places = {(each.module_path, each.source) for each in found}
    inside_other_operators = [r for r in others if (r.module_path, r.source) not in places]
    found |= dict.fromkeys(_of_refusal(refusal) for refusal in inside_other_operators)
    return tuple(found)


def _of_refusal(refusal: Refusal) -> Explanation:
    where = (refusal.module_path, refusal.source)
    return Explanation(*where, "refused", refusal.kind, refusal.reason)


def _as_planned(
    stream: ResidualStream, plan: PlannedStream, told: Mapping[fx.Node, Explanation]
) -> dict[fx.Node, Explanation]:
    sites = {site.state: site for site in plan.sites}
    sublayers = [(s, n) for n, block in enumerate(plan.blocks, start=1) for s in block]
    lengths = [len(sublayer.additions) for sublayer, _ in sublayers]
    found = {}
    for position, state in enumerate(stream.states[1:], start=1):
        if state.addition is None:
            continue
        before = told[state.node]
        if before.verdict != "residual":
            reason = f"{before.reason} ({plan.name})"
        else:
            index = next(i for i in range(len(lengths)) if sum(lengths[: i + 1]) >= state.depth)
            readers = _reads(_site_after(sites, stream, position))
            reason = (
                f"residual addition {state.depth} of {len(stream.additions)} of the stream "
                f"{plan.name}, in sublayer {index + 1} of {len(sublayers)}, block "
                f"{sublayers[index][1]} of {len(plan.blocks)}; {readers}"
            )
        found[state.node] = dataclasses.replace(before, reason=reason)
    return found


def _site_after(sites: Mapping[int, Site], stream: ResidualStream, position: int) -> Site | None:
    """The site at an addition, or in a stream of deltas at the norm or the like that follows it."""
    onward = stream.states[position + 1 :]
    for later, state in enumerate((stream.states[position], *onward), start=position):
        if later > position and state.addition is not None:
            return None
        if state.reads:
            return sites.get(later)
    return None


def _reads(site: Site | None) -> str:
    if site is None:
        return "nothing reads its result but the next addition"
    if site.left_out:
        return (
            f"its readers get the state as it was (site {site.name} is left out"
            f"{LEFT_OUT[site.left_out_by]})"
        )
    return f"its readers get the mix of site {site.name} over {site.num_sources} sources"


def _line(each: Explanation) -> str:
    place = f"{each.module_path or 'the model itself'}, {each.source or 'unknown line'}"
    rule = "" if each.verdict in ("residual", "absorbed") else f" [{each.rule}]"
    return f"{place}: {_TITLES[each.verdict]}{rule}: {each.reason}"
