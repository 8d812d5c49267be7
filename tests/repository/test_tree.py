"""The shape of the repository: small folders, and tests that do not lean on each other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from support.paths import ROOT, TESTS

PRODUCT = ("src/internvl_edge", "export", "quantize", "runtime", "demo")
DOORS = {"__init__", "conftest"}
MOST = 13
MOST_IMPORTS = 14


def names_in(folder: Path) -> list[str]:
    """Modules, and folders that hold any; links are for type checkers."""
    found = []
    for path in folder.iterdir():
        if path.suffix == ".py" and path.stem not in DOORS:
            found.append(path.stem)
        elif path.is_dir() and not path.is_symlink() and any(path.rglob("*.py")):
            found.append(path.name)
    return sorted(found)


@pytest.mark.parametrize("top", PRODUCT)
def test_every_door_names_what_is_inside(top: str) -> None:
    for door in (ROOT / top).rglob("__init__.py"):
        if door.parent in (ROOT / "src" / "internvl_edge", ROOT / "export" / "models"):
            continue  # the public names; models, which are re-exported
        text = ast.get_docstring(ast.parse(door.read_text(encoding="utf-8"))) or ""
        missing = [name for name in names_in(door.parent) if not re.search(rf"\b{name}\b", text)]
        assert not missing, f"{door}: {', '.join(missing)}"


def module_of(path: Path) -> str:
    name = path.relative_to(ROOT).with_suffix("").as_posix().removesuffix("/__init__")
    return (
        name.removeprefix("src/").replace("/", ".")
        if name.startswith("src/")
        else (f"internvl_edge.{name.replace('/', '.')}")
    )


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """Module → the modules of ours that it imports, at the top or inside functions."""
    files = {
        module_of(path): path
        for top in PRODUCT
        for path in (ROOT / top).rglob("*.py")
        if not any(parent.is_symlink() for parent in path.parents)
    }
    found = {name: set[str]() for name in files}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("internvl_edge"):
                spelled = [f"{node.module}.{alias.name}" for alias in node.names]
                found[name] |= {one if one in files else str(node.module) for one in spelled}
    return found


def test_no_module_leans_on_many_others(imports: dict[str, set[str]]) -> None:
    crowded = {name: len(others) for name, others in imports.items() if len(others) > MOST_IMPORTS}
    assert not crowded


def test_no_two_rooms_import_each_other(imports: dict[str, set[str]]) -> None:
    """A folder and one inside it may: it is the whole, and calls its parts."""
    doors = {name for name in imports if any(other.startswith(f"{name}.") for other in imports)}

    def room(name: str) -> str:
        return name if name in doors else name.rpartition(".")[0]

    edges = {(room(name), room(other)) for name, others in imports.items() for other in others}
    mutual = {
        (one, other)
        for one, other in edges
        if one < other and (other, one) in edges and not f"{other}.".startswith(f"{one}.")
    }
    assert len(doors) > 30
    assert not mutual


@pytest.mark.parametrize("top", [*PRODUCT, "tests"])
def test_every_folder_is_seen_at_a_glance(top: str) -> None:
    folders = [ROOT / top, *(path for path in (ROOT / top).rglob("*") if path.is_dir())]
    crowded = {
        str(folder.relative_to(ROOT)): names
        for folder in folders
        if not folder.is_symlink() and len(names := names_in(folder)) > MOST
    }
    assert not crowded


def imported(path: Path) -> set[str]:
    """Every part of the dotted names that a module imports."""
    parts: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            parts.update(part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            parts.update((node.module or "").split("."), (alias.name for alias in node.names))
    return parts


@pytest.mark.slow
def test_tests_import_support_and_not_each_other() -> None:
    modules = list(TESTS.rglob("*.py"))
    tests = {path.stem for path in modules if path.name.startswith("test_")} | {"conftest"}
    assert len(tests) > 50
    leaning = {str(path.relative_to(TESTS)): imported(path) & tests for path in modules}
    assert not {path: names for path, names in leaning.items() if names}
