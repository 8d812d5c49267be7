"""The wheel holds every module and data file that the repository tracks, by every road to it."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from support.paths import ROOT

FOLDERS = {
    "src/internvl_edge": "internvl_edge",
    "export": "internvl_edge/export",
    "quantize": "internvl_edge/quantize",
    "runtime": "internvl_edge/runtime",
    "demo": "internvl_edge/demo",
    "calib_data": "internvl_edge/calib_data",
}
OUTSIDE = "internvl_edge/demo/training/"  # makes what the wheel holds, and stays here


def tracked() -> set[str]:
    """Where every tracked file of a package folder belongs in the wheel."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout: there is no list of tracked files to compare with")
    found = set()
    for name in done.stdout.splitlines():
        if (ROOT / name).is_symlink() or not (ROOT / name).is_file():
            continue  # the links are for type checkers
        for folder, package in FOLDERS.items():
            if name.startswith(f"{folder}/"):
                found.add(package + name[len(folder) :])
    return {name for name in found if not name.startswith(OUTSIDE)}


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def build(source: Path, out: Path, *kinds: str) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", *kinds, "-o", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_package_is_listed() -> None:
    """What the wheel's own test finds in a minute, for who has just added a folder."""
    folders = {str(Path(name).parent) for name in tracked() if name.endswith(".py")}
    folders.add("internvl_edge/calib_data")  # data alone
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert listed == sorted(folder.replace("/", ".") for folder in folders)


@pytest.mark.slow
def test_the_wheel_is_complete(tmp_path: Path) -> None:
    copy = tmp_path / "copy"  # setuptools writes build/ and egg-info beside the sources
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(copy)], check=True)
    for name in subprocess.run(
        ["git", "ls-files", "-m", "-o", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
        else:
            (copy / name).unlink(missing_ok=True)
    build(copy, tmp_path / "direct", "--wheel")
    (direct,) = (tmp_path / "direct").glob("*.whl")
    assert contents(direct) == tracked()

    build(copy, tmp_path / "sdist", "--sdist")
    (sdist,) = (tmp_path / "sdist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    build(unpacked, tmp_path / "through", "--wheel")
    (through,) = (tmp_path / "through").glob("*.whl")
    assert contents(through) == contents(direct)


def test_the_top_level_folders_cannot_be_imported_by_their_bare_names() -> None:
    for name in ("export", "quantize", "runtime"):
        done = subprocess.run(
            [sys.executable, "-c", f"import {name}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode != 0
        assert f"internvl_edge.{name}" in done.stderr


LOCK, CONSTRAINTS = ROOT / "requirements.lock", ROOT / "constraints.txt"
PINNED = re.compile(r"^([a-z0-9][a-z0-9._-]*)==(\S+)", re.MULTILINE)


def locked() -> dict[str, set[str]]:
    """Package → its versions; a few differ by the version of Python."""
    versions: dict[str, set[str]] = {}
    for name, version in PINNED.findall(LOCK.read_text(encoding="utf-8")):
        versions.setdefault(name, set()).add(version)
    return versions


def test_every_package_that_ci_installs_is_pinned_with_its_hashes() -> None:
    text = LOCK.read_text(encoding="utf-8")
    entries = re.split(r"(?m)^(?=[a-z0-9])", re.sub(r"(?m)^ *#.*\n", "", text))
    packages = [entry for entry in entries if entry.strip()]
    assert len(packages) > 100
    for entry in packages:
        assert PINNED.match(entry), entry
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry


def test_the_lock_has_what_the_extras_name_at_the_versions_that_were_measured() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    (everything,) = optional["all"]  # what stays out is heavy, or is from a vendor's index
    extras = [*everything.split("[")[1].rstrip("]").split(","), "docs"]
    named = [*project["dependencies"], *(one for extra in extras for one in optional[extra])]
    names = {re.split(r"[\[>=<;]", one)[0] for one in named} - {"internvl-edge"}
    assert names <= set(locked())
    pins = dict(PINNED.findall(CONSTRAINTS.read_text(encoding="utf-8")))
    assert {name: locked()[name] for name in pins} == {n: {v} for n, v in pins.items()}
