"""A run's settings, what it tells, and the recipe by which an interrupted one is known again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from internvl_edge.errors import UsageError
from internvl_edge.integrations.bulk.sources.source import Content, Source

if TYPE_CHECKING:
    from internvl_edge.runtime.images.options import ImageOptions
    from internvl_edge.runtime.images.transform import Transform
    from internvl_edge.runtime.text.tokenizer import OnLong

__all__ = ["Done", "How", "Problem", "Progress", "Report", "make_recipe"]

FORMAT = 1  # of recipes and parts; another where a run of before could not be taken up
MOST_BATCH = 4096
BATCH, BATCH_PIXELS = 32, 8 * 224 * 224


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """How rows are embedded.

    Raises:
        UsageError: a batch that cannot be.
    """

    mode: str = "c"
    transform: Transform | None = None
    normalize: bool = False
    on_long: OnLong = "truncate"  # "error": a row of a text of too many tokens has no embedding
    # Rows that a thread, or an actor, computes at a time; None: 32, and of pictures larger than 112
    # by 112 as many as have the pixels of 8 of 224 by 224, so that each thread's memory is bounded.
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size is not None and not 1 <= self.batch_size <= MOST_BATCH:
            raise UsageError(f"batch_size {self.batch_size}: expected 1 to {MOST_BATCH}")

    def rows_at_once(self, side: int = 1) -> int:
        """Return how many rows are computed at a time, of pictures those of side × side."""
        if self.batch_size is not None:
            return self.batch_size
        return max(1, min(BATCH, BATCH_PIXELS // side**2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A row that could not be embedded."""

    path: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run has come."""

    rows: int
    of: int | None  # None: unknown until all is read
    errors: int
    rows_per_second: float  # of this run
    seconds_left: float | None  # None: too early to say
    share: float  # of the source that is read, 0 to 1

    def told(self) -> str:
        """Say how fast it goes, and how long it will take."""
        rows = f"{self.rows} rows, " if self.of is None else ""
        errors = f", {self.errors} errors" if self.errors else ""
        return f"{rows}{self.rows_per_second:.1f}/s{errors}{_left(self.seconds_left)}"


def _left(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f", {seconds / size:.1f} {unit} left"
    return f", {seconds:.0f} s left"


Report = Callable[[Progress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What a run wrote."""

    rows: int
    errors: int  # of these, without an embedding
    kept_rows: int = 0  # of these, from an interrupted run
    seconds: float = 0.0
    problems: tuple[Problem, ...] = field(default=())  # the first of this run


def make_recipe(digest: str, source: Source, how: How, images: ImageOptions) -> dict[str, Any]:
    """Write down everything that decides what the rows are.

    Args:
        digest: of the compiled directory's manifest.
        source: of the rows.
        how: they are embedded.
        images: how pictures are read.
    """
    recipe: dict[str, Any] = {
        "format": FORMAT,
        "model": digest,
        "source": source.fingerprint,
        "columns": [f"{column.name}: {column.type}" for column in source.kept],
        "content": str(source.content),
        "normalize": how.normalize,
    }
    if source.content is Content.TEXTS:
        recipe |= {"on_long": how.on_long}
    else:
        recipe |= {"mode": how.mode, "transform": how.transform, "images": asdict(images)}
    return recipe
