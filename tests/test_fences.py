"""Which part may import which: the import fences of the design."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPOSITORY

PACKAGE = REPOSITORY / "batch_inference"
# Earlier modules never import later ones.
ORDER = (
    "statistics", "config", "failures", "leftovers", "hardware", "environment", "peaks", "plan", "overview",
    "ray_cluster", "rendezvous", "prompts", "engine", "ranks", "worker", "replicas", "results", "capacity", "metrics",
    "console", "verdict", "experiment", "packing", "tables", "exports", "compare", "decide", "analysis", "sheet",
    "lines", "plots", "answers", "sections", "report", "page", "summary",
)  # fmt: skip
ANALYSIS = {"pandas", "matplotlib", "seaborn", "scipy"}


def imported_names(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_the_order_names_every_module() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert modules == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_earlier_ones(module: str) -> None:
    ours = {name.split(".")[1] for name in imported_names(PACKAGE / f"{module}.py") if name.startswith("batch_inf")}
    assert ours <= set(ORDER[: ORDER.index(module)])


def test_heavy_imports_have_their_places() -> None:
    places = {"vllm": {"engine"}, "torch": {"engine", "ranks", "peaks"}, "ray": {"ray_cluster"}}
    for module in ORDER:
        roots = {name.split(".")[0] for name in imported_names(PACKAGE / f"{module}.py")}
        for package, allowed in places.items():
            assert (package in roots) == (module in allowed)


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        ("experiment, batch_inference.replicas, batch_inference.engine", ANALYSIS | {"vllm", "torch"}),
        ("plots, batch_inference.report, batch_inference.page, batch_inference.summary", {"vllm", "torch"}),
    ],
)
def test_measuring_and_analysing_stay_apart(modules: str, forbidden: set[str]) -> None:
    program = f"import sys, batch_inference.{modules}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert not forbidden & set(done.stdout.split())
