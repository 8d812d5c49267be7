"""What SECURITY.md says of the sources themselves: no code of others is run, nothing is fetched."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache

import pytest
from support.paths import ROOT

PRODUCT = ("src", "export", "quantize", "runtime", "demo")
SERVER = "src/internvl_edge/serve/server.py"
# Module → the files that may import it. Text functions of ``urllib`` fetch nothing.
GUARDED = {
    **{key: set[str]() for key in ("pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle")},
    **{key: set[str]() for key in ("urllib.request", "http.client", "requests", "httpx")},
    **{key: set[str]() for key in ("aiohttp", "ftplib", "smtplib", "huggingface_hub")},
    "socket": {SERVER},  # it listens
    "jinja2": {"src/internvl_edge/compiler/report/report.py"},  # a template of ours
}
MAPS = {"mmap", "memmap", "safe_open", "load_file"}
RUNS_CODE = {"eval", "exec", "compile", "__import__"}


@cache
def trees() -> dict[str, ast.Module]:
    """Every source of the product, by its path."""
    return {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for top in PRODUCT
        for path in sorted((ROOT / top).rglob("*.py"))
        if not any(parent.is_symlink() for parent in path.parents)
    }


def names_in(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def calls_in(tree: ast.AST) -> Iterator[tuple[str, dict[str, str]]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg or "": ast.unparse(k.value) for k in node.keywords}


@cache
def imports() -> dict[str, list[str]]:
    """List what each source imports."""
    return {file: list(names_in(tree)) for file, tree in trees().items()}


@cache
def calls() -> dict[str, list[tuple[str, dict[str, str]]]]:
    """List every call of each source, by the name that is called and its keywords' sources."""
    return {file: list(calls_in(tree)) for file, tree in trees().items()}


@pytest.mark.parametrize("module", sorted(GUARDED))
def test_modules_that_fetch_or_run_code_of_others_are_not_imported(module: str) -> None:
    users = {
        file
        for file, names in imports().items()
        for name in names
        if name == module or name.startswith(f"{module}.")
        if name != "urllib.request.url2pathname"
    }
    assert users == GUARDED[module]


def test_no_text_of_others_is_run() -> None:
    for file, called in calls().items():
        for name, keywords in called:
            assert name not in RUNS_CODE, file
            assert keywords.get("shell", "False") == "False" and name != "os.system", file
            assert keywords.get("allow_pickle", "False") == "False", file
            assert keywords.get("trust_remote_code", "False") == "False", file


def test_pickles_are_loaded_in_one_place_without_code() -> None:
    loads = [
        (file, keywords)
        for file, called in calls().items()
        for name, keywords in called
        if name == "torch.load"
    ]
    assert [file for file, _ in loads] == ["export/convert/one_pickle.py"]
    assert all(keywords["weights_only"] == "True" for _, keywords in loads)


def test_weights_of_checkpoints_are_read_and_never_mapped() -> None:
    for file, called in calls().items():
        if file.startswith(("export/", "quantize/", "src/internvl_edge/artifact/")):
            names = {*imports()[file], *(name for name, _ in called)}
            maps = {name for name in names if set(name.split(".")) & MAPS}
            assert not maps, file


def test_engines_get_no_host_code_and_no_plugins() -> None:
    names = {
        node.attr
        for tree in trees().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
    }
    assert not {"engine_host_code_allowed", "load_library", "init_libnvinfer_plugins"} & names


def test_keys_are_compared_in_constant_time() -> None:
    gate = calls()["src/internvl_edge/serve/http/gate.py"]
    assert "hmac.compare_digest" in {name for name, _ in gate}
