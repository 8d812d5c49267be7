"""The documents: links lead somewhere, generated pages are up to date, commands do what they say.

A fenced block of ``bash`` or ``python`` in the pages of ``RUN`` is run, all pages in one folder and
in that order, unless the line above it says ``<!-- not run: WHY -->``. The folder stands for a
clone: the tutorial makes a checkpoint, pictures and a compiled directory in it, and the pages after
it use them. An export that a page before has made is not made again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.paths import ROOT

from internvl_edge import cli
from internvl_edge.quantize.recipe import Recipe

pytestmark = pytest.mark.slow

DOCS = ROOT / "docs"
RUN = (DOCS / "tutorial.md", ROOT / "README.md", *sorted((DOCS / "howto").glob("*.md")))
OTHERS = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "demo", "calib_data", "benchmarks")
FENCE = re.compile(r"^( *)```(\S*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
ROOMS = (
    "artifact benchmark benchmarks cli compiler demo docs examples export files quantize runtime"
)
SOURCE = re.compile(rf"`((?:src/|tests/|{'/|'.join(ROOMS.split())}/)(?:[\w/]+(?:\.py|/))?)`")
PLACES = (ROOT, ROOT / "src" / "internvl_edge")
NOT_RUN = re.compile(r"<!-- not run: \S.* -->$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block, and where it stands."""

    where: str
    language: str
    text: str
    is_run: bool


def documents() -> list[Path]:
    """Every Markdown file that a reader may open."""
    places = [ROOT / "README.md", DOCS, ROOT / "examples", *(ROOT / name for name in OTHERS)]
    return [file for p in places for file in (sorted(p.rglob("*.md")) if p.is_dir() else [p])]


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        before = text[: match.start()]
        yield Block(
            where=f"{page.relative_to(ROOT)}:{before.count(chr(10)) + 1}",
            language=match[2],
            text=match[3],
            is_run=NOT_RUN.search(before.rstrip("\n")) is None,
        )


def anchors(page: Path) -> set[str]:
    """What ``#...`` may name: GitHub's and MyST's names of the headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", documents(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.findall(re.sub(r"`[^`\n]*`", "", text)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", documents(), ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_are_there(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        pytest.skip("old entries name the files of their day")
    for name in SOURCE.findall(page.read_text(encoding="utf-8")):
        assert any((place / name).exists() for place in PLACES), f"{page.name}: {name}"


def test_the_index_leads_to_every_page() -> None:
    listed = next(b for b in blocks(DOCS / "index.md") if "hidden" in b.text).text.split()[1:]
    pages = {str(p.relative_to(DOCS).with_suffix("")) for p in DOCS.rglob("*.md")}
    assert set(listed) == pages - {"index"}
    assert len(listed) == len(set(listed))


def test_the_readme_is_read_in_a_minute() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


def test_generated_pages_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    import generate

    for name, text in generate.pages().items():
        kept = (DOCS / "reference" / name).read_text(encoding="utf-8")
        assert kept == text, f"docs/reference/{name}: run python docs/generate.py"


def test_the_page_of_recipes_has_every_field_and_its_default() -> None:
    text = (DOCS / "reference" / "recipe.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (?:`(.+?)`)? ?\| ", text, re.MULTILINE)
    fields = dataclasses.fields(Recipe)
    assert [name for name, _ in rows] == [field.name for field in fields]
    for field, (name, default) in zip(fields, rows, strict=True):
        if name != "name":
            wanted = list(field.default) if isinstance(field.default, tuple) else field.default
            assert json.loads(default) == wanted, name


def test_the_tables_of_full_size_are_those_of_the_results() -> None:
    command = [sys.executable, "benchmarks/fullsize.py", "--table"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() in (DOCS / "performance.md").read_text(encoding="utf-8")


def test_blocks_are_run_or_say_why_not() -> None:
    for page in RUN:
        for block in blocks(page):
            assert block.language in ("bash", "python", "text"), block.where
    runs = [block for page in RUN for block in blocks(page) if block.is_run]
    assert sum(block.language != "text" for block in runs) > 25  # the pattern still finds them


# --- run -----------------------------------------------------------------------------------------


def test_every_command_of_the_documents_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("demo", "examples", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    made: set[str] = set()
    for page in RUN:
        for block in blocks(page):
            if block.is_run and block.language == "python":
                run_python(block)
            elif block.is_run and block.language == "bash":
                for command in commands(block.text):
                    if command not in made:
                        code = run_command(command)
                        heard = capfd.readouterr()
                        assert code == 0, f"{block.where}: {command}\n{heard.out}{heard.err}"
                    if command.startswith("internvl-edge export "):
                        made.add(command)
    shutil.rmtree(tmp_path)


def commands(text: str) -> list[str]:
    """The commands of a block, without comments, continued lines joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


def run_command(command: str) -> int:
    """Run a command of a page; ours in this process, where it does not import PyTorch again."""
    name, *arguments = shlex.split(command)
    if name == "cd":
        os.chdir(arguments[0])
        return 0
    if name == "internvl-edge":
        return cli.run(arguments)
    return subprocess.run([sys.executable if name == "python" else name, *arguments]).returncode


def run_python(block: Block) -> None:
    namespace = types.ModuleType("__main__").__dict__
    exec(compile(block.text, block.where, "exec"), namespace)
