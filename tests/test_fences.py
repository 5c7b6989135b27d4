"""Which room may import which, and where heavy packages may be imported: the rules of the house."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from conftest import REPOSITORY

PACKAGE = REPOSITORY / "batch_inference"
# A room imports itself and these.
MAY_IMPORT = {
    "core": set(),
    "plan": {"core"},
    "measure": {"core", "plan"},
    "analyze": {"core"},
    "launch": {"core", "plan", "measure", "analyze"},
}
# Packages that only these modules import.
PLACES = {
    "vllm": {"engine", "meta_device", "tokenizing"},
    "torch": {"engine", "ranks", "peaks", "meta_device", "stand_ins"},
    "ray": {"ray_cluster"},
}
ANALYSIS = {"pandas", "matplotlib", "seaborn"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@cache
def imported_names(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_every_module_is_in_a_room() -> None:
    assert {path.parent.name for path in modules() if path.name != "__init__.py"} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_what_it_may(path: Path) -> None:
    if path.parent == PACKAGE:
        assert not imported_names(path)
        return
    rooms = {name.split(".")[1] for name in imported_names(path) if name.startswith("batch_inference.")}
    assert rooms <= MAY_IMPORT[path.parent.name] | {path.parent.name}


def test_heavy_packages_have_their_places() -> None:
    for package, allowed in PLACES.items():
        importing = {path.stem for path in modules() if package in {n.split(".")[0] for n in imported_names(path)}}
        assert importing == allowed


@pytest.mark.parametrize(
    ("loaded", "forbidden"),
    [
        (("measure.experiment", "measure.replicas", "measure.engine"), ANALYSIS | {"vllm", "torch"}),
        # No room that analyses may import one that may import these: the fast tests above see that.
        pytest.param(("analyze.plots", "analyze.report"), {"vllm", "torch"}, marks=pytest.mark.slow),
    ],
)
def test_measuring_and_analysing_stay_apart(loaded: tuple[str, ...], forbidden: set[str]) -> None:
    imports = "".join(f"import batch_inference.{name}\n" for name in loaded)
    program = f"{imports}import sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert not forbidden & set(done.stdout.split())
