"""How pictures are read: what stands under transparency, and how large they may be."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from internvl_edge.errors import UsageError, shortened

__all__ = ["MEAN", "STD", "WHOLE_PIXELS", "ImageOptions", "image_options"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of R, G, B in 0..1: ImageNet's

WHOLE_PIXELS = 50_000_000  # of a file that is decoded whole
LARGEST_PIXELS = 256_000_000  # of a JPEG, decoded at a fraction, and of a picture in memory
LARGEST_MEGAPIXELS = 4000.0  # that can be asked for
COLOURS = {"white": (255, 255, 255), "black": (0, 0, 0)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageOptions:
    """How a model reads pictures.

    Raises:
        UsageError: a colour or a size that cannot be.
    """

    # Under what is transparent: a name, "#rrggbb" or (r, g, b); None drops transparency, and shows
    # whatever colour is stored there, as the original does.
    background: str | tuple[int, int, int] | None = "white"
    # The largest picture, in millions of pixels, and decoded whole up to there. None: 50 are
    # decoded whole; larger JPEGs, up to 256, at a half, a quarter or an eighth.
    max_megapixels: float | None = None

    def __post_init__(self) -> None:
        _ = self.colour
        most = self.max_megapixels
        is_number = isinstance(most, int | float) and not isinstance(most, bool)
        if most is not None and not (
            is_number and math.isfinite(most) and 0 < most <= LARGEST_MEGAPIXELS
        ):
            raise UsageError(
                f"max_megapixels {shortened(most)}: expected a number above 0, up to "
                f"{LARGEST_MEGAPIXELS:g}, or None"
            )

    @property
    def colour(self) -> tuple[int, int, int] | None:
        """The background as levels of red, green and blue."""
        given = self.background
        if given is None:
            return None
        if isinstance(given, str):
            if given.lower() in COLOURS:
                return COLOURS[given.lower()]
            if re.fullmatch(r"#[0-9a-fA-F]{6}", given):
                red, green, blue = bytes.fromhex(given[1:])
                return red, green, blue
        elif _are_levels(given):
            red, green, blue = given
            return red, green, blue
        raise UsageError(
            f"background {shortened(given)}: expected {', '.join(COLOURS)}, #rrggbb, three levels "
            "from 0 to 255, or None"
        )

    @property
    def whole_pixels(self) -> int:
        """How many pixels a file may have to be decoded whole."""
        return WHOLE_PIXELS if self.max_megapixels is None else int(self.max_megapixels * 1e6)

    @property
    def largest_pixels(self) -> int:
        """How many pixels a JPEG, or a picture in memory, may have."""
        return LARGEST_PIXELS if self.max_megapixels is None else int(self.max_megapixels * 1e6)


def image_options(given: object) -> ImageOptions:
    """Return options that were handed over; None: the defaults.

    Raises:
        UsageError: something else.
    """
    if given is None:
        return ImageOptions()
    if not isinstance(given, ImageOptions):
        raise UsageError(f"images: expected ImageOptions, found {type(given).__name__}")
    return given


def _are_levels(given: object) -> bool:
    return (
        isinstance(given, tuple | list)
        and len(given) == 3
        and all(type(level) is int and 0 <= level <= 255 for level in given)
    )
