"""Pictures in a request: ``data:`` URLs, and nothing that would have to be fetched.

A client's string never reaches the runtime, where a string is a path: ``decoded`` gives bytes.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

from internvl_edge.errors import InputError
from internvl_edge.runtime.images.decode import image_size
from internvl_edge.serve.http.problems import bad_request

__all__ = ["ImageUrl", "decoded", "image_url"]

LONGEST_HEAD = 256  # of a data URL, before its data


class ImageUrl:
    """A picture as it came, and where in the request it stood."""

    __slots__ = ("param", "text")

    def __init__(self, text: str, param: str) -> None:
        self.text, self.param = text, param


def image_url(value: Any, param: str) -> ImageUrl:
    """Accept a ``data:`` URL with base64; it is not decoded yet.

    Raises:
        Problem: anything else, whatever it names.
    """
    if isinstance(value, str) and value[:5].lower() == "data:":
        head, comma, _ = value[: LONGEST_HEAD + 1].partition(",")
        if comma and head.lower().endswith(";base64"):
            return ImageUrl(value, param)
    raise bad_request(
        "invalid_image_url",
        f"{param}: expected a picture as a data: URL with base64; nothing is fetched",
        param,
    )


def decoded(url: ImageUrl, max_pixels: int) -> bytes:
    """Return the bytes of a picture of at most so many pixels; none is decompressed yet.

    Raises:
        Problem: no base64, no picture, or too large a one.
    """
    data = url.text[url.text.index(",") + 1 :]
    try:
        picture = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        text = f"{url.param}: expected base64, found other characters or a length that cannot be"
        raise bad_request("invalid_base64", text, url.param) from None
    try:
        width, height = image_size(picture)
    except InputError as error:
        raise bad_request("invalid_image", f"{url.param}: {error}", url.param) from error
    if width * height > max_pixels:
        text = f"{url.param}: expected at most {max_pixels} pixels, found {width}x{height}"
        raise bad_request("invalid_image", text, url.param)
    return picture
