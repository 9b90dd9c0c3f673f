"""Patterns over module paths: what they match is written out by hand."""

from __future__ import annotations

import pytest

from attnres_compile.errors import ConfigError
from attnres_compile.path_patterns import check_all_match, chooser, matcher

PATHS = [f"model.layers.{n}.{part}" for n in range(12) for part in ("attn", "mlp")] + ["model.norm"]


def layers(pattern: str) -> list[int]:
    """The numbers of the layers of which a pattern takes a part, and -1 for the norm."""
    found = filter(matcher(pattern, PATHS), PATHS)
    return sorted({-1 if path == "model.norm" else int(path.split(".")[2]) for path in found})


@pytest.mark.parametrize(
    ("pattern", "numbers"),
    [
        ("model", [-1, *range(12)]),
        ("model.layers", list(range(12))),
        ("model.layers.1", [1]),  # and not 10 or 11
        ("model.layers.1*", [1, 10, 11]),
        ("model.layers.[12]", [1, 2]),
        ("*.attn", list(range(12))),
        ("*attn", list(range(12))),
        ("layers", []),  # not anchored at the model
        ("model.norm", [-1]),
        ("model.nor", []),
        ("", []),
        ("model.layers[::2]", [0, 2, 4, 6, 8, 10]),
        ("model.layers[1::2].attn", [1, 3, 5, 7, 9, 11]),
        ("model.layers[:3]", [0, 1, 2]),
        ("model.layers[-2:]", [10, 11]),
        ("*.layers[4:6]", [4, 5]),
        ("*[::5]", [0, 5, 10]),
        ("model.layers[::-6]", [5, 11]),
        ("model.layers[20:]", []),
        ("model.norm[::2]", []),
    ],
)
def test_what_a_pattern_matches(pattern: str, numbers: list[int]) -> None:
    assert layers(pattern) == numbers


def test_a_slice_takes_only_its_part() -> None:
    matches = matcher("model.layers[:2].mlp", PATHS)
    assert [path for path in PATHS if matches(path)] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert matches("model.layers.1.mlp.up")
    assert not matches("model.layers.1.mlp_up")
    assert not matches("model.layers.10.mlp")


def test_two_slices() -> None:
    paths = [f"stages.{s}.blocks.{b}" for s in range(3) for b in range(4)]
    matches = matcher("stages[1:].blocks[-1:]", paths)
    assert [path for path in paths if matches(path)] == ["stages.1.blocks.3", "stages.2.blocks.3"]


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("*.layers[-1:]", ["encoder.layers.3", "decoder.layers.1"]),
        ("*.layers[-3:-1]", ["encoder.layers.1", "encoder.layers.2", "decoder.layers.0"]),
        ("*.layers[::-2]", ["encoder.layers.1", "encoder.layers.3", "decoder.layers.1"]),
        ("encoder.layers[-1:]", ["encoder.layers.3"]),
        ("*.layers[3:]", ["encoder.layers.3"]),
    ],
)
def test_each_list_is_sliced_by_its_own_length(pattern: str, matched: list[str]) -> None:
    lengths = {"encoder": 4, "decoder": 2}
    paths = [f"{part}.layers.{n}" for part, length in lengths.items() for n in range(length)]
    assert list(filter(matcher(pattern, paths), paths)) == matched


def test_a_list_in_a_list() -> None:
    paths = [f"{a}.{b}" for a, length in (("m.0", 3), ("m.1", 2)) for b in range(length)]
    assert list(filter(matcher("m.*[-1:]", paths), paths)) == ["m.0.2", "m.1.1"]
    # of m itself the last child is taken, and of each of the others
    assert list(filter(matcher("*[-1:]", paths), paths)) == ["m.0.2", "m.1.0", "m.1.1"]


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        ((), ["a", "a.b", "c"]),
        (("a",), ["a", "a.b"]),
        (("!a.b",), ["a", "c"]),
        (("a", "!a.b"), ["a"]),
        (("a.b", "c"), ["a.b", "c"]),
        (("!*",), []),
    ],
)
def test_what_patterns_choose(patterns: tuple[str, ...], chosen: list[str]) -> None:
    wanted = chooser(patterns, ["a", "a.b", "c"])
    assert [path for path in ("a", "a.b", "c") if wanted([path])] == chosen


def test_one_unwanted_name_is_enough() -> None:
    wanted = chooser(("a", "!b"), ["a", "b", "c"])
    assert wanted(["a", "c"])
    assert not wanted(["a", "b"])
    assert not wanted(["c"])


def test_a_step_of_zero() -> None:
    with pytest.raises(ConfigError, match="has a slice whose step is zero"):
        matcher("layers[::0]", PATHS)


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("model.layers.*.atn", "model.layers.0.attn"),
        ("!model.layer", "model.layers"),
        ("model.layers[40:].mlp", "model.layers.0.mlp"),
    ],
)
def test_a_pattern_that_matches_nothing(pattern: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check_all_match("sites", ("model.norm", pattern), PATHS, "site")
    start = f"sites={pattern!r} matches no site of this model; the nearest of its paths: {nearest}"
    assert str(raised.value).startswith(start)


def test_patterns_that_all_match() -> None:
    check_all_match("sites", ("model.norm", "!*.mlp"), PATHS, "site")
    with pytest.raises(ConfigError, match="it has: a, b"):
        check_all_match("streams", ("c",), ["a", "b", "a"], "stream")
