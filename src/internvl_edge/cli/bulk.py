"""``embed SOURCE OUT -o DEST.parquet``: its options, and a source embedded here or on Ray."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from internvl_edge.artifact.manifest import MANIFEST
from internvl_edge.cli.console import Output, error_line, human
from internvl_edge.cli.options import DIRECTORY, Running, names, one_of
from internvl_edge.errors import InternVLError, MediaError, UsageError
from internvl_edge.files.packages import require

if TYPE_CHECKING:
    from internvl_edge.integrations.bulk.job import Done, How
    from internvl_edge.integrations.bulk.sources.source import Source

__all__ = ["Bulk", "bulk_options", "embed_source"]

Function = TypeVar("Function", bound=Callable[..., Any])

THIS_MACHINE = "local"  # of --ray
MAX_TOLD = 10  # rows without an embedding, one by one


@dataclass(frozen=True, slots=True, kw_only=True)
class Bulk:
    """What is embedded into which file, with ``-o``."""

    dest: Path | None
    column: str | None
    keep: tuple[str, ...] | None
    transform: Any
    batch_size: int | None
    resume: bool
    ray: str | None  # an address; THIS_MACHINE
    actors: int | None

    def require_dest(self) -> None:
        """Refuse these options where there is no ``-o``.

        Raises:
            UsageError: the first of them.
        """
        for option, is_given in (
            ("--column", self.column is not None),
            ("--keep", self.keep is not None),
            ("--transform", self.transform is not None),
            ("--batch-size", self.batch_size is not None),
            ("--resume", self.resume),
            ("--ray", self.ray is not None),
            ("--actors", self.actors is not None),
        ):
            if is_given:
                raise UsageError(f"{option} goes with -o DEST.parquet; add that or leave it out")


def bulk_options(function: Function) -> Function:
    """Add the options of the form with ``-o``; the command gets a ``Bulk`` as ``bulk``."""

    @click.option(
        "-o",
        "--out",
        "dest",
        type=DIRECTORY,
        help="Embed SOURCE into this new .parquet file: a row for each picture, in order.",
    )
    @click.option(
        "--column",
        help="With -o, of Parquet or tar: what is embedded, pictures or texts; default: pictures.",
    )
    @click.option(
        "--keep",
        callback=names,
        help="With -o: columns that go along, comma-separated; default: all of Parquet, none of "
        "tar files.",
    )
    @click.option(
        "--transform",
        type=one_of("retrieval", "classification", "clip"),
        help="With -o: how pictures are brought to size; default: the model's own.",
    )
    @click.option(
        "--batch-size",
        type=click.IntRange(1, 4096),
        help="With -o: rows that a thread computes at a time; default: 32, and fewer of pictures "
        "above 112 by 112: 8 of 224, 2 of 448.",
    )
    @click.option(
        "--resume", is_flag=True, help="With -o: go on after what an interrupted run finished."
    )
    @click.option(
        "--ray",
        is_flag=False,
        flag_value=THIS_MACHINE,
        help='With -o: by actors of the Ray cluster at this address, or "auto"; DEST is then a '
        "folder of Parquet files. Without a value: a Ray of this machine alone.",
    )
    @click.option(
        "--actors",
        type=click.IntRange(1, 100_000),
        help="With --ray: how many; default: one for each GPU, else for each core.",
    )
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        given = {field.name: kwargs.pop(field.name) for field in fields(Bulk)}
        return function(*args, bulk=Bulk(**given), **kwargs)

    return wrapped  # type: ignore[return-value]


def embed_source(
    output: Output,
    places: tuple[Path, ...],
    bulk: Bulk,
    running: Running,
    how: dict[str, Any],
    *,
    force: bool,
    recursive: bool,
    skip_errors: bool,
) -> None:
    """Embed a source into a file, and tell what became of it."""
    require("pyarrow")
    from internvl_edge.integrations.bulk import job, staging
    from internvl_edge.integrations.bulk.sources.opening import open_source

    dest = cast(Path, bulk.dest)
    if bulk.actors is not None and bulk.ray is None:
        raise UsageError("--actors goes with --ray; add that or leave it out")
    sources, out = _source_and_out(places)
    if bulk.ray is not None and running.backend not in ("auto", "onnxruntime"):
        raise UsageError(
            f"--backend {running.backend}: the actors of --ray run ONNX Runtime; leave one of them "
            "out"
        )
    if bulk.ray is not None:  # whose workers have other current folders
        sources = tuple(Path(os.path.abspath(source)) for source in sources)
    staging.check_dest(dest, resume=bulk.resume, force=force, folder=bulk.ray is not None)
    settings = job.How(transform=bulk.transform, batch_size=bulk.batch_size, **how)
    source = open_source(sources, bulk.column, bulk.keep, recursive=recursive)
    again: dict[str, Any] = {"resume": bulk.resume, "force": force}
    try:
        if bulk.ray is not None:
            done = _on_ray(output, source, out, bulk, settings, running, again)
        else:
            done = _here(output, source, out, dest, settings, running, again)
    except (KeyboardInterrupt, InternVLError) as error:
        if not isinstance(error, UsageError) and staging.staging_of(dest).exists():
            option = "--resume in place of --force" if force else "--resume"
            output.say(f"what is finished stays; the same command with {option} goes on")
        raise
    _tell(output, dest, done)
    if done.errors and not skip_errors:
        raise click.exceptions.Exit(MediaError.exit_code)


def _here(
    output: Output,
    source: Source,
    out: Path,
    dest: Path,
    settings: How,
    running: Running,
    again: dict[str, Any],
) -> Done:
    """Embed a source in this process, and show how far it is."""
    from internvl_edge.compiler.progress import Progress
    from internvl_edge.integrations.bulk import run

    with running.for_pool().open(out) as model, output.progress() as shown:

        def report(progress: Any) -> None:
            done, total = progress.rows, progress.of
            if total is None:
                done, total = int(100 * progress.share), 100
            shown(Progress(step="embed", detail=progress.told(), done=done, total=total))

        return run.embed(
            source, model, dest, settings, threads=running.threads, report=report, **again
        )


def _on_ray(
    output: Output,
    source: Source,
    out: Path,
    bulk: Bulk,
    settings: How,
    running: Running,
    again: dict[str, Any],
) -> Done:
    """Embed a source by actors of a Ray cluster."""
    require("ray")
    from internvl_edge.integrations import ray

    quiet = output.quiet or not human.is_terminal
    with ray.connected(None if bulk.ray == THIS_MACHINE else bulk.ray, quiet=quiet):
        return ray.embed(
            source,
            out,
            cast(Path, bulk.dest),
            settings,
            actors=bulk.actors,
            num_threads=running.threads or 1,
            device=running.device,
            images=running.images,
            allow_slow=running.allow_slow,
            **again,
        )


def _source_and_out(places: tuple[Path, ...]) -> tuple[tuple[Path, ...], Path]:
    """Tell SOURCE from OUT: OUT is last, or first, as in the form without ``-o``."""
    if len(places) < 2:
        raise UsageError("-o: expected SOURCE and OUT: internvl-edge embed SOURCE OUT -o DEST")
    if (places[0] / MANIFEST).is_file() and not (places[-1] / MANIFEST).is_file():
        return places[1:], places[0]
    return places[:-1], places[-1]


def _tell(output: Output, dest: Path, done: Done) -> None:
    """Say what was written, and the first rows that were not embedded."""
    for problem in done.problems[:MAX_TOLD]:
        is_named = problem.path in problem.message
        error_line(problem.message if is_named else f"{problem.path}: {problem.message}")
    if done.errors > min(len(done.problems), MAX_TOLD):
        output.say(f"rows without an embedding: {done.errors}; the column error says why")
    kept = f", {done.kept_rows} of them from before" if done.kept_rows else ""
    failed = f", {done.errors} without an embedding" if done.errors else ""
    output.lines([f"{dest}: {done.rows} rows{kept}{failed}"])
    errors = [{"path": problem.path, "message": problem.message} for problem in done.problems]
    counts = {"rows": done.rows, "kept_rows": done.kept_rows, "errors": done.errors}
    output.result({"file": dest, **counts, "first_errors": errors, "seconds": done.seconds})
