"""The first page of a package names every file in it: a reader finds there where to go on."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def named_in(overview: str) -> list[str]:
    return re.findall(r"^    (\w+): ", overview, flags=re.MULTILINE)


@pytest.mark.parametrize("package", ["passes", "kernels"])
def test_every_file_is_named_once(package: str) -> None:
    folder = ROOT / package
    overview = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert sorted(named_in(overview)) == sorted(files)


def test_a_file_left_out_or_named_twice_would_show() -> None:
    overview = "Text: more.\n\n    one: the first\n    two: the second\n        wrapped: text\n"
    assert named_in(overview) == ["one", "two"]
    assert named_in(overview + "    one: again\n") == ["one", "two", "one"]
