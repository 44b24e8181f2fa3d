"""Imports go one way: packages import those of earlier layers, modules each other in no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = (
    ("errors", "env", "_version"),
    ("core",),
    ("reference",),
    ("dispatch",),
    ("triton_kernels", "cutlass_kernels"),
    ("ops",),
    ("checkpoint", "compat"),
    ("distributed", "integrations"),
    ("commands",),
    ("__init__", "__main__"),
)
LAYER = {package: number for number, packages in enumerate(LAYERS) for package in packages}


def modules() -> dict[str, Path]:
    """Every module of the product, by its name as installed."""
    found = {}
    for folder in ("hybrid_mxfp8", "triton_kernels", "cutlass_kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if folder == "hybrid_mxfp8" else ("hybrid_mxfp8", *parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(path: Path, names: set[str]) -> Iterator[str]:
    """Modules of the product that a file imports anywhere, but for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom) and node.module in names:
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in submodules if name in names)
            if not all(name in names for name in submodules):
                yield node.module


def package_of(module: str) -> str:
    return f"{module}.__init__".split(".")[1]


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    found = modules()
    assert len(found) > 50
    return {name: set(imports(path, set(found))) for name, path in found.items()}


def test_packages_import_earlier_layers(graph: dict[str, set[str]]) -> None:
    wrong = [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if package_of(other) not in (package_of(module), "__init__")
        and LAYER[package_of(other)] >= LAYER[package_of(module)]
    ]
    assert not wrong


def test_modules_import_in_no_circle(graph: dict[str, set[str]]) -> None:
    TopologicalSorter({module: others - {module} for module, others in graph.items()}).prepare()
