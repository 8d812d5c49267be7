"""The table of packages agrees with the extras that install them."""

from __future__ import annotations

import re
import tomllib

import pytest
from support.paths import ROOT

from internvl_edge.errors import MissingDependency
from internvl_edge.files import packages


def test_every_package_comes_with_its_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {
        extra: {re.split(r"[\[><=~ ]", requirement)[0] for requirement in requirements}
        for extra, requirements in project["optional-dependencies"].items()
    }
    for package in packages.PACKAGES.values():
        assert package.name in extras[package.extra], package


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "is_installed", lambda module: module != "onnx_ir")
    packages.require("torch", "onnx")
    with pytest.raises(MissingDependency, match=r'onnx-ir .*"internvl-edge\[export\]"'):
        packages.require(*packages.EXPORT)


def test_a_package_that_nobody_has() -> None:
    assert packages.version_of("no-such-package") is None
    assert packages.versions(("no-such-package",)) == {"no-such-package": None}
    assert not packages.is_installed("no_such_module")
