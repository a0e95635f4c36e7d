"""Imports point one way: server -> engine, server -> schemas; and nothing heavy leaks into the inner two."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "engine": {"schemas", "server", "pydantic", "mcp", "tests", "torch", "transformers"},
    "schemas": {"engine", "server", "numpy", "mcp", "tests"},
    "server": {"tests", "torch", "transformers"},
}


def imported(source: str) -> set[str]:
    """Top-level names of absolute imports, also those inside functions and `if TYPE_CHECKING`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_one_way(package):
    wrong = {
        str(path.relative_to(ROOT)): sorted(bad)
        for path in files(package)
        if (bad := imported(path.read_text("utf-8")) & FORBIDDEN[package])
    }
    assert files(package)
    assert not wrong


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_are_absolute(package):
    for path in files(package):
        relative = [
            n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.ImportFrom) and n.level
        ]
        assert not relative, path


def test_the_server_is_where_engine_and_schemas_meet():
    both = [path for path in files("server") if {"engine", "schemas"} <= imported(path.read_text("utf-8"))]
    assert both


def test_imports_hidden_in_functions_are_seen():
    hidden = "def f():\n    from mcp.types import Tool\nif TYPE_CHECKING:\n    import pydantic.main\n"
    assert imported(hidden) == {"mcp", "pydantic"}
