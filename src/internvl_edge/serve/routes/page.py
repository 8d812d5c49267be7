"""The page and the description of the routes: files of this package, by fixed names."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

from internvl_edge.serve.service import Service

__all__ = ["FILES", "FILES_WITHOUT_PAGE", "file"]

FILES_WITHOUT_PAGE = {"/openapi.json": "openapi.json"}
FILES = {
    "/": "page.html",
    "/page.js": "page.js",
    "/page.css": "page.css",
    "/favicon.svg": "favicon.svg",
} | FILES_WITHOUT_PAGE
KINDS = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
    "json": "application/json",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@cache
def _content(name: str) -> bytes:
    return (files("internvl_edge.serve") / "static" / name).read_bytes()


def file(name: str, _: Service, __: Request) -> Response:
    """Give one of the files."""
    headers = {
        "content-security-policy": POLICY,
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
    }
    return Response(_content(name), headers=headers, media_type=KINDS[name.rpartition(".")[2]])
