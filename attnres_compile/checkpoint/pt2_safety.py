"""Looks through a ``.pt2`` archive before PyTorch reads it, since reading can run code.

torch.export evaluates expressions and guards as Python, resolves operators by attribute path, and
unpickles example inputs and some constants. Here each of these is held against a list of what
exported models contain; anything else is refused, with its place.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from attnres_compile.checkpoint.record import parse_json
from attnres_compile.errors import CheckpointError, UnsafeFileError

_OPERATOR = re.compile(
    r"torch\.ops\.(?!load_library\b|import_module\b|loaded_libraries\b)[a-zA-Z]\w*(\.[a-zA-Z]\w*)+"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_|not_"
    r"|getitem|lshift|rshift|index|abs|inv|invert|xor)"
    r"|math\.(ceil|floor|trunc|sqrt|log|log2|exp|sin|cos|tan|tanh|isqrt|gcd)"
    r"|torch\._?sym_\w+|torch\.(max|min|ops\.higher_order\.\w+)"
)
_READS_FILES = ("from_file", "load")
_FUNCTIONS = frozenset(
    "Symbol Integer Float Rational Max Min Mod PythonMod FloorDiv CleanDiv CeilDiv ModularIndexing"
    " Where TruncToInt FloorToInt CeilToInt RoundToInt RoundDecimal ToFloat IntTrueDiv FloatTrueDiv"
    " Eq Ne Lt Le Gt Ge And Or Not Pow PowByNatural FloatPow Abs Identity floor ceiling math"
    " int float bool max min abs round cast_symbool_to_symint_guardless".split()
)
_NAMES = re.compile(r"[a-z]{1,2}\d+|L|args|kwargs|inputs|oo|True|False|None")
_ATTRIBUTES = frozenset("size shape stride numel dim ndim storage_offset item".split())
_NODES = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Load, ast.Subscript, ast.Attribute, ast.Call),
    *(ast.keyword, ast.Compare, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Tuple, ast.List),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.IfExp),
)
_IMPORTS = ("default_factory_module", "__enum__")  # keys of input structures that import
_LONGEST = 10_000  # characters of an expression


def check_archive(path: Path) -> None:
    """Refuses an archive that is damaged, or whose reading could run code.

    Raises:
        CheckpointError: it is damaged, or no ``.pt2`` archive.
        UnsafeFileError: it holds what could run code; says what and where.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(archive, path)
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise CheckpointError(f"{path.name} is no .pt2 archive, or damaged: {error}.") from error


def is_harmless(expression: str) -> bool:
    """Whether an expression does nothing but arithmetic on sizes.

    Example:
        >>> is_harmless("Max(1, s0 // 2)"), is_harmless("__import__('os').system('ls')")
        (True, False)
    """
    if len(expression) > _LONGEST:
        return False
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        return all(_is_harmless(node) for node in ast.walk(tree))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _check_members(archive: zipfile.ZipFile, path: Path) -> None:
    members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(f"{path.name} is compressed, which torch.export does not do.")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise CheckpointError(f"{path.name} is an archive that claims more than it has.")
    names = [member.filename for member in members]
    if not any(re.fullmatch(r"[^/]+/models/[^/]+\.json", name) for name in names):
        raise CheckpointError(f"{path.name} holds no program of torch.export.")
    for name in names:
        inner = name.partition("/")[2]
        if inner.endswith(".json") and not inner.startswith("extra/"):
            _check_json(parse_json(archive.read(name), f"{path.name}: {inner}"), path, inner)
        elif inner.startswith("data/sample_inputs/"):
            _check_pickle(archive.read(name), path, inner)
        elif inner.startswith("data/constants/") and "/tensor_" not in inner:
            raise UnsafeFileError(
                f"{path.name} holds {inner}, an object that is made by running code."
            )
        elif inner.startswith("data/aotinductor/"):
            raise UnsafeFileError(f"{path.name} holds compiled code ({inner}); it is not loaded.")


def _check_json(data: Any, path: Path, inner: str) -> None:
    """All strings that PyTorch resolves, evaluates, or imports by."""
    for key, value in _items(data):
        if key == "target" and isinstance(value, str) and not _is_operator(value):
            raise UnsafeFileError(
                f"{path.name}: {inner} calls {value[:80]!r}, which is no tensor operator."
            )
        if key == "expr_str" and not (isinstance(value, str) and is_harmless(value)):
            raise UnsafeFileError(
                f"{path.name}: {inner} holds the expression {str(value)[:80]!r}, which would be "
                "evaluated as code."
            )
        if key == "guards_code" and not all(isinstance(g, str) and is_harmless(g) for g in value):
            raise UnsafeFileError(f"{path.name}: {inner} holds guards that would run as code.")
        if key == "use_pickle" and value:
            raise UnsafeFileError(
                f"{path.name}: {inner} holds a pickled tensor, which is not opened; export a model "
                "whose weights are plain tensors."
            )
        if key in _IMPORTS:
            raise UnsafeFileError(f"{path.name}: {inner} asks for an import by name ({key}).")


def _check_pickle(content: bytes, path: Path, inner: str) -> None:
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content))
    except Exception as error:  # damaged files fail in every way
        raise CheckpointError(f"{path.name}: {inner} is damaged: {error!s:.120}") from error
    if unsafe:
        raise UnsafeFileError(
            f"{path.name}: its example inputs are pickled objects ({', '.join(unsafe)[:120]}), "
            "which would run code; export with tensors as inputs."
        )


def _items(data: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values of all objects within, also of those in strings that are JSON themselves.

    Without recursion, and every string is parsed as its reader would, so that an escaped spelling
    is seen too.
    """
    pending = [data]
    while pending:
        each = pending.pop()
        if isinstance(each, dict):
            yield from each.items()
            pending += each.values()
        elif isinstance(each, list):
            pending += each
        elif isinstance(each, str) and each.lstrip()[:1] in ("{", "[", '"'):
            pending += _as_json(each)


def _as_json(text: str) -> list[Any]:
    try:
        return [json.loads(text)]
    except (ValueError, RecursionError):
        return []


def _is_operator(target: str) -> bool:
    return bool(_OPERATOR.fullmatch(target)) and not any(
        part in _READS_FILES for part in target.split(".")
    )


def _is_harmless(node: ast.AST) -> bool:
    if not isinstance(node, _NODES):
        return False
    if isinstance(node, ast.Constant):
        plain = isinstance(node.value, int | float | type(None))
        return plain or (isinstance(node.value, str) and bool(re.fullmatch(r"\w+", node.value)))
    if isinstance(node, ast.Name):
        return node.id in _FUNCTIONS or bool(_NAMES.fullmatch(node.id))
    if isinstance(node, ast.Attribute):
        return node.attr in _ATTRIBUTES or node.attr in ("ceil", "floor", "trunc", "sqrt")
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow | ast.LShift):
        # 9**9**9 would not end
        return isinstance(node.right, ast.Constant) and node.right.value in (1, 2, 3, -1, 0.5)
    return True
