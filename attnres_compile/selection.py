"""Which streams and sites are converted, by the options and by what can be trained, and blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from attnres_compile.config import AttnResConfig
from attnres_compile.errors import ConfigError
from attnres_compile.passes.streams import Refusal
from attnres_compile.path_patterns import check_all_match, chooser, matcher
from attnres_compile.plans import PlannedStream, Site

SitePaths = dict[str, dict[int, tuple[str, ...]]]
"""By the name of the stream and the state of the site: the modules that a site is about."""


def blocks_by_stream(names: Sequence[str], config: AttnResConfig) -> list[AttnResConfig]:
    """The options for each stream: a mapping of ``num_blocks`` resolved, by the first match.

    Raises:
        ConfigError: a pattern of the mapping matches no stream.
    """
    if not isinstance(config.num_blocks, tuple):
        return [config] * len(names)
    patterns = [pattern for pattern, _ in config.num_blocks]
    check_all_match("num_blocks", patterns, names, "residual stream")
    rules = [(matcher(pattern, names), count) for pattern, count in config.num_blocks]
    return [
        dataclasses.replace(config, num_blocks=next((n for m, n in rules if m(name)), "auto"))
        for name in names
    ]


def check_blocks(streams: Sequence[PlannedStream], options: Mapping[str, AttnResConfig]) -> None:
    """Refuses more blocks than the deepest stream they are asked for has sublayers.

    Raises:
        ConfigError: says how many there can be.
    """
    asked = [options[stream.name].num_blocks for stream in streams]
    for count in dict.fromkeys(asked):
        depths = [len(s.sublayers) for s, n in zip(streams, asked, strict=True) if n == count]
        if isinstance(count, int) and count > max(depths):
            every = len(depths) == len(streams)
            which = "the model's deepest stream" if every else "the deepest stream it is asked for"
            raise ConfigError(
                f"num_blocks={count} is more than the {max(depths)} sublayers of {which}; ask for "
                f"at most {max(depths)}, or for 'full'."
            )


def select(
    streams: Sequence[PlannedStream], paths: SitePaths, config: AttnResConfig
) -> tuple[list[PlannedStream], dict[str, list[Refusal]]]:
    """The streams that are wanted, their unwanted sites left out; refusals of the others, by name.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    names = [stream.name for stream in streams]
    check_all_match("streams", config.streams or (), names, "residual stream")
    chosen = chooser(config.streams or (), names)
    wanted = [stream for stream in streams if chosen([stream.name])]
    refusals = {s.name: _left_out(s, "streams") for s in streams if s not in wanted}
    if config.sites is None:
        return wanted, refusals
    thinned = _with_chosen_sites(wanted, paths, config.sites)
    empty = [stream for stream in thinned if not any(site.query_name for site in stream.sites)]
    refusals |= {stream.name: _left_out(stream, "sites") for stream in empty}
    return [stream for stream in thinned if stream not in empty], refusals


def leave_out_untrained(
    streams: Sequence[PlannedStream], trained: Mapping[str, set[int]]
) -> tuple[list[PlannedStream], dict[str, list[Refusal]]]:
    """The sites a gradient comes back to; refusals of the streams without any, by name.

    `trained` holds the states of these sites, by the name of the stream.
    """
    thinned = [
        dataclasses.replace(
            stream,
            sites=tuple(
                site if site.state in trained[stream.name] else _plain(site, "no-gradient")
                for site in stream.sites
            ),
        )
        for stream in streams
    ]
    silent = [stream for stream in thinned if not any(site.query_name for site in stream.sites)]
    reason = (
        "no gradient comes back to the stream (it runs under torch.no_grad, or no output is made "
        "of it), so that its queries could not be trained"
    )
    refusals = {
        stream.name: [
            Refusal("no-gradient", reason, a.module_path, a.source) for a in stream.additions
        ]
        for stream in silent
    }
    return [stream for stream in thinned if stream not in silent], refusals


def _with_chosen_sites(
    streams: Sequence[PlannedStream], paths: SitePaths, patterns: tuple[str, ...]
) -> list[PlannedStream]:
    everywhere = [
        path
        for stream in streams
        for site in stream.sites
        if site.query_name is not None
        for path in paths[stream.name][site.state]
    ]
    check_all_match("sites", patterns, everywhere, "site with several sources")
    chosen = chooser(patterns, everywhere)
    return [
        dataclasses.replace(
            stream,
            sites=tuple(
                site if chosen(paths[stream.name][site.state]) else _plain(site, "sites")
                for site in stream.sites
            ),
        )
        for stream in streams
    ]


def _plain(site: Site, cause: str) -> Site:
    if site.query_name is None:  # the root, or left out before
        return site
    return dataclasses.replace(
        site, num_sources=1, query_name=None, gain_name=None, left_out_by=cause
    )


def _left_out(stream: PlannedStream, option: str) -> list[Refusal]:
    reason = f"left out by the option {option}"
    return [Refusal("left-out", reason, a.module_path, a.source) for a in stream.additions]
