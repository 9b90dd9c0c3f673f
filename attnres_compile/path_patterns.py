"""Glob patterns over module paths, with slices for the numbers in them."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence

from attnres_compile.errors import ConfigError

_SLICE = re.compile(r"\[(-?\d*):(-?\d*)(?::(-?\d*))?\]")
_MOST_NAMED = 6


def matcher(pattern: str, paths: Iterable[str]) -> Callable[[str], bool]:
    """Whether a pattern matches a module path, or a path that it goes through.

    ``*``, ``?`` and ``[ab]`` are those of a shell, and ``*`` takes dots too; ``name[a:b:step]``
    are the children of ``name`` with these numbers, as Python slices a list; where the pattern fits
    several lists, each is sliced by its own length.

    Args:
        pattern: without the ``!`` that leaves something out.
        paths: all that there are, for negative numbers and open ends.

    Raises:
        ConfigError: a slice with a step of zero.

    Example:
        >>> paths = ["h.0.attn.q", "h.1.attn", "h.2.mlp", "h.10.attn"]
        >>> list(filter(matcher("h[::2].attn", paths), paths))
        ['h.0.attn.q', 'h.10.attn']
    """
    expression, end = "", 0
    for found in _SLICE.finditer(pattern):
        expression += _translated(pattern[end : found.start()])
        expression = _numbered(found, expression, paths, pattern)
        end = found.end()
    expression += _translated(pattern[end:])
    # The second stream of a module has its path and a number: ``encoder#2``.
    compiled = re.compile(rf"(?s:{expression})(?:#\d+)?(?:\..*)?")
    return lambda path: compiled.fullmatch(path) is not None


def chooser(patterns: Sequence[str], paths: Iterable[str]) -> Callable[[Iterable[str]], bool]:
    """Whether something that goes by several paths is chosen by patterns.

    It is if some pattern matches, or there are only patterns with ``!``, and if none of those does.

    Example:
        >>> chosen = chooser(("h", "!*.mlp"), ["h.0.attn", "h.0.mlp", "norm"])
        >>> [path for path in ("h.0.attn", "h.0.mlp", "norm") if chosen([path])]
        ['h.0.attn']
    """
    known = list(paths)
    wanted = [matcher(p, known) for p in patterns if not p.startswith("!")]
    unwanted = [matcher(p[1:], known) for p in patterns if p.startswith("!")]

    def chosen(names: Iterable[str]) -> bool:
        own = list(names)
        matched = not wanted or any(matches(name) for matches in wanted for name in own)
        return matched and not any(matches(name) for matches in unwanted for name in own)

    return chosen


def check_all_match(option: str, patterns: Iterable[str], paths: Iterable[str], what: str) -> None:
    """Refuses a pattern that matches no path: a slip of the pen converts something else.

    Raises:
        ConfigError: names the pattern and the paths that are nearest to it.
    """
    known = list(dict.fromkeys(paths))
    for pattern in patterns:
        matches = matcher(pattern.removeprefix("!"), known)
        if not any(matches(path) for path in known):
            raise ConfigError(
                f"{option}={pattern!r} matches no {what} of this model; {_nearest(pattern, known)}."
            )


def _nearest(pattern: str, known: list[str]) -> str:
    if len(known) <= _MOST_NAMED:
        return f"it has: {', '.join(known) or 'none'}"
    through = {path[: m.start()] for path in known for m in re.finditer(r"\.|$", path)}
    # Compared without wildcards and numbers, so that h.*.atn is nearest to h.0.attn.
    bare = {path: re.sub(r"\d+", "", path) for path in sorted(through)}
    stripped = re.sub(r"[!*?]|\[.*?\]|\d+", "", pattern)
    near = difflib.get_close_matches(stripped, bare.values(), n=2 * _MOST_NAMED, cutoff=0.5)
    named = [next(path for path in bare if bare[path] == each) for each in dict.fromkeys(near)]
    return f"the nearest of its paths: {', '.join((named or known)[:_MOST_NAMED])}"


def _translated(glob: str) -> str:
    if not glob:
        return ""
    return re.sub(r"\\[zZ]$", "", fnmatch.translate(glob))


def _numbered(found: re.Match[str], before: str, paths: Iterable[str], pattern: str) -> str:
    """The numbered children that a slice takes of each list that `before` matches."""
    bounds = [int(text) if text else None for text in found.groups()]
    if bounds[2] == 0:
        raise ConfigError(f"{pattern!r} has a slice whose step is zero.")
    matches = re.compile(f"(?s:{before})").fullmatch
    lengths: dict[str, int] = {}
    for path in paths:
        for child in re.finditer(r"\.(\d+)(?=\.|$)", path):
            parent = path[: child.start()]
            if matches(parent):
                lengths[parent] = max(lengths.get(parent, 0), int(child[1]) + 1)
    taken = [
        rf"{re.escape(parent)}\.(?:{'|'.join(map(str, range(length)[slice(*bounds)]))})"
        for parent, length in lengths.items()
        if range(length)[slice(*bounds)]
    ]
    return f"(?:{'|'.join(taken)})" if taken else r"(?!)"
