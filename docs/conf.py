"""Sphinx's settings: `make docs` builds the site into out/docs, with warnings as errors."""

import re
from typing import Any

project = "internvl-edge"
html_theme = "furo"
html_title = project
html_copy_source = False
html_show_copyright = False
extensions = ["myst_parser"]
myst_heading_anchors = 4


def setup(app: Any) -> None:
    """Offer Markdown files of the repository that are not pages as downloads."""
    app.connect("source-read", _outside_as_downloads)


def _outside_as_downloads(app: Any, page: str, source: list[str]) -> None:
    up = "../" * (page.count("/") + 1)
    source[0] = re.sub(rf"\]\(({up}\w[^)]*\.md)\)", r"](path:\1)", source[0])
