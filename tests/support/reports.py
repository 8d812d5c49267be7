"""A manifest to report on, and a report's page as a parser reads it."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

from support.artifacts import contents, manifest_of

from internvl_edge.artifact.manifest import Manifest

HOSTILE = '<script>alert("&")</script>'


def manifest(**changed: Any) -> Manifest:
    """A manifest with a verified component."""
    found = manifest_of(contents(), **changed)
    figures = {"against": "PyTorch float32", "samples": 4, "cosine": 0.99876, "sqnr_db": 31.4}
    figures |= {"max_abs": 0.25, "blocks": [0, 2]}
    vision = replace(found.components["vision"], verification=figures)
    return replace(found, components={"vision": vision})


class Reader(HTMLParser):
    """Every tag with its attributes, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    return reader
