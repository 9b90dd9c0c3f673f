"""What a user gets from `pip install`: the files, the names, and an import that does nothing."""

from __future__ import annotations

import ast
import json
import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# folder of the repository -> name it is installed under
PACKAGES = {
    "attnres_compile": "attnres_compile",
    "passes": "attnres_compile.passes",
    "kernels": "attnres_compile.kernels",
}
# what `import attnres_compile` must leave to the functions that need it
HEAVY_MODULES = (
    "matplotlib",
    "networkx",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "rich",
    "torch._dynamo",
    "torch._inductor",
    "torchvision",
    "transformers",
    "triton",
)

pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").exists(), reason="needs the source tree, not an installed package"
)


def run(*command: str | Path, cwd: Path, pythonpath: Path | None = None) -> str:
    """The standard output of a command that has to succeed, run without a network."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if pythonpath is not None:
        environment["PYTHONPATH"] = str(pythonpath)
    finished = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, f"{command}\n{finished.stdout}\n{finished.stderr}"
    return finished.stdout


def pip_without_network(python: str | Path, verb: str, *arguments: str | Path, cwd: Path) -> None:
    run(
        *(python, "-m", "pip", "--disable-pip-version-check", verb),
        *("--no-index", "--no-deps", "--no-build-isolation", *arguments),
        cwd=cwd,
    )


def source_files(folder: str) -> list[Path]:
    """The files of a package, relative to its folder."""
    paths = (ROOT / folder).rglob("*")
    return sorted(
        path.relative_to(ROOT / folder)
        for path in paths
        if path.is_file() and "__pycache__" not in path.parts
    )


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged, since a build writes into the tree that it builds."""
    tree = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    for folder in PACKAGES:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tree


@pytest.fixture(scope="module")
def wheel(source_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution so that both are complete."""
    built = tmp_path_factory.mktemp("built")
    build_sdist = f"from setuptools.build_meta import build_sdist; build_sdist({str(built)!r})"
    run(sys.executable, "-c", build_sdist, cwd=source_tree)
    (sdist,) = built.glob("attnres_compile-*.tar.gz")
    pip_without_network(sys.executable, "wheel", "--wheel-dir", built, sdist, cwd=built)
    (wheel,) = built.glob("attnres_compile-*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel is installed into; it comes before the editable install."""
    target = tmp_path_factory.mktemp("installed")
    pip_without_network(sys.executable, "install", "--target", target, wheel, cwd=target)
    return target


def test_wheel_holds_every_file_of_the_three_folders(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"{package.replace('.', '/')}/{path.as_posix()}"
        for folder, package in PACKAGES.items()
        for path in source_files(folder)
    }
    assert expected - names == set()
    assert "attnres_compile/py.typed" in names
    assert "attnres_compile/passes/__init__.py" in names
    assert "attnres_compile/kernels/__init__.py" in names


def test_wheel_has_no_other_top_level_names(wheel: Path) -> None:
    top_level = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"attnres_compile"}


def test_wheel_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        texts = {
            Path(name).name: archive.read(name).decode()
            for name in archive.namelist()
            if ".dist-info/" in name
        }
    backends = "[torch_dynamo_backends]\nattnres = attnres_compile.backend:"
    assert backends in texts["entry_points.txt"]
    assert "License-Expression: Apache-2.0" in texts["METADATA"]
    assert texts["LICENSE"] == (ROOT / "LICENSE").read_text()


IMPORT_AND_LOCATE = """
import importlib, json, sys
names = sys.argv[1:]
print(json.dumps([importlib.import_module(name).__file__ for name in names]))
"""


def test_installed_wheel_imports(installed: Path, tmp_path: Path) -> None:
    script = (sys.executable, "-c", IMPORT_AND_LOCATE, *PACKAGES.values())
    files = json.loads(run(*script, cwd=tmp_path, pythonpath=installed))
    assert files == [
        str(installed.joinpath(*package.split("."), "__init__.py")) for package in PACKAGES.values()
    ]


def test_editable_install_follows_the_sources(source_tree: Path, tmp_path: Path) -> None:
    """In a virtual environment of its own, which borrows what is installed in this one."""
    tree = shutil.copytree(source_tree, tmp_path / "source")
    environment = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (site_packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()))
    pip_without_network(python, "install", "--editable", tree, cwd=tmp_path)

    (tree / "passes" / "written_later.py").touch()
    modules = (*PACKAGES.values(), "attnres_compile.passes.written_later")
    files = json.loads(run(python, "-c", IMPORT_AND_LOCATE, *modules, cwd=tmp_path))
    assert files == [
        *(str(tree / folder / "__init__.py") for folder in PACKAGES),
        str(tree / "passes" / "written_later.py"),
    ]


def imported_names(path: Path) -> set[str]:
    """The absolute names of the modules that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
    return names


def test_nothing_imports_passes_or_kernels_as_top_level_packages() -> None:
    folders = (*PACKAGES, "tests", "examples", "benchmarks")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert files
    offenders = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name in imported_names(path)
        if name.split(".")[0] in ("passes", "kernels")
    }
    assert offenders == set()


def test_import_is_pure_and_quick(tmp_path: Path) -> None:
    """Measured in CPU time beyond torch's own import, in a process of its own."""
    script = """
import json, sys, time
import torch
before = set(sys.modules)
state = lambda: (torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state().sum())
state_before = state()
start = time.process_time()
import attnres_compile
seconds = time.process_time() - start
assert state() == state_before
print(json.dumps({"seconds": seconds, "modules": sorted(set(sys.modules) - before)}))
"""
    report = json.loads(run(sys.executable, "-c", script, cwd=tmp_path))
    heavy = [name for name in report["modules"] if name.startswith(HEAVY_MODULES)]
    assert heavy == []
    assert report["seconds"] < 1.0


def test_backend_is_found_by_name_without_an_import(tmp_path: Path) -> None:
    script = """
import sys
import torch._dynamo
assert "attnres" in torch._dynamo.list_backends()
assert "attnres_compile" not in sys.modules, "listing the backends must not load them"
print(torch._dynamo.lookup_backend("attnres").__module__)
"""
    assert run(sys.executable, "-c", script, cwd=tmp_path) == "attnres_compile.backend\n"
