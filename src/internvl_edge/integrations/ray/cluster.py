"""A source embedded by actors of a Ray cluster, into a folder of Parquet files.

    .DEST.parquet.partial/       see ``bulk.staging``
        rows/                    the files that Ray's tasks write
        checkpoint/              which rows are in them, as Ray keeps it

Ray notes which rows a file will have before it writes it, and confirms that afterwards; a run that
goes on removes files that were not confirmed. Nothing here starts a cluster but ``connected``
without an address, and that is one of this machine alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import internvl_edge
from internvl_edge.artifact.publish import limit_modes, placed
from internvl_edge.errors import InternVLError, MediaError, UsageError
from internvl_edge.files.disk import exchange, os_errors, rename_new, sync, sync_tree
from internvl_edge.files.packages import require
from internvl_edge.integrations.bulk.job import Done, How, make_recipe
from internvl_edge.integrations.bulk.parts import counted, finished
from internvl_edge.integrations.bulk.rows import Embedder
from internvl_edge.integrations.bulk.sources.source import PATH, Piece, Source
from internvl_edge.integrations.bulk.staging import check_dest, is_replacing, staging
from internvl_edge.integrations.ray.batches import Rows

if TYPE_CHECKING:
    from internvl_edge.runtime.images.options import ImageOptions

__all__ = ["connected", "embed"]

BLOCK = 64  # rows that are read at a time
ROWS, CHECKPOINT = "rows", "checkpoint"
NO_ROWS = "the source has no rows"
USAGE_STATS = "RAY_USAGE_STATS_ENABLED"  # reports to Ray's makers; off unless the user said so


def embed(
    source: Source,
    out: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    how: How = How(),
    *,
    actors: int | None = None,
    num_threads: int = 1,
    device: str = "auto",
    images: ImageOptions | None = None,
    allow_slow: bool = False,
    resume: bool = False,
    force: bool = False,
) -> Done:
    """Embed every row of a source into a new folder of Parquet files, with Ray's actors.

    The rows and their columns are those of ``bulk.run.embed``; their order is any. Checkpoints lie
    next to DEST until it is complete. Ray is the one that this process is connected to.

    Args:
        source: of ``open_source``, by absolute paths: workers have other current folders.
        out: the compiled directory.
        dest: the folder.
        how: rows are embedded.
        actors: that compute; None: one for each GPU, or ``num_threads`` cores, of the cluster.
        num_threads: of each actor.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"``: GPUs where the cluster has any.
        images: how pictures are read.
        allow_slow: on a GPU, let ONNX Runtime run what it is slow at; see ``OrtOptions``.
        resume: go on after what an interrupted run of the same recipe left, if there is anything.
        force: replace the folder, and whatever an interrupted run left.

    Raises:
        UsageError: the folder exists or cannot be written, another run is writing to it, or what
            an interrupted run left is of another recipe.
        MediaError: the source has no row, or none that can be embedded.
        InternVLError: Ray could not finish; what is finished stays.
    """
    require("ray")
    path, place = placed(Path(dest)), os.path.abspath(out)
    check_dest(path, resume=resume, force=force, folder=True)
    options = internvl_edge.OrtOptions(num_threads=num_threads, allow_slow=allow_slow)
    with internvl_edge.load(place, options=options, images=images) as model:
        Embedder(model.components, source.content, how)  # which refuses what cannot be
        digest = model.components.artifact.digest
        recipe = make_recipe(digest, source, how, model.components.images)
    if resume and (done := finished(path, recipe)) is not None:
        return done
    replaces = resume and is_replacing(path)
    if not source.pieces:
        raise MediaError(f"{NO_ROWS}; there is nothing to embed")
    began = time.monotonic()
    arguments = {
        "out": place,
        "content": source.content,
        "how": how,
        "num_threads": num_threads,
        "images": images,
        "recipe": recipe,
        "allow_slow": allow_slow,
    }
    with staging(path, recipe, resume=resume, force=force, holds=f"{ROWS}/*") as folder:
        force |= replaces  # as the interrupted run was told
        kept = _count(folder / ROWS)
        _run(source, folder, arguments, actors, device)
        rows, errors = _checked(folder / ROWS, source.rows)
        if errors == rows:
            shutil.rmtree(folder)
            why = f"none of {rows} rows can be embedded" if rows else NO_ROWS
            raise MediaError(f"{why}; there is nothing to write")
        with os_errors(path):
            _publish(folder / ROWS, path, force=force)
            shutil.rmtree(folder, ignore_errors=True)
    seconds = time.monotonic() - began
    return Done(rows=rows, errors=errors, kept_rows=kept, seconds=seconds)


def _run(
    source: Source, folder: Path, arguments: dict[str, Any], actors: int | None, device: str
) -> None:
    """Run the job on the cluster; rows that a checkpoint has are left out."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from ray.data.checkpoint import CheckpointConfig

    resources, threads = ray.cluster_resources(), arguments["num_threads"]
    on_gpu = device.startswith("cuda") or (device == "auto" and resources.get("GPU", 0) >= 1)
    most = resources.get("GPU", 0) if on_gpu else resources.get("CPU", 1) / threads
    context = DataContext.get_current()
    before = context.checkpoint_config
    context.checkpoint_config = CheckpointConfig(
        id_column=PATH,
        checkpoint_path=str(folder / CHECKPOINT),
        delete_checkpoint_on_success=False,  # until the rows have their own name
    )
    try:  # reading and writing need little, and every core may have an actor: num_cpus=0
        rows = ray.data.read_datasource(
            _datasource(source), override_num_blocks=len(source.pieces), num_cpus=0
        )
        embedded = rows.map_batches(
            Rows,
            fn_constructor_kwargs={**arguments, "device": "cuda" if on_gpu else "cpu"},
            batch_size=None,  # whole blocks, which are cut as they are without Ray
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=ActorPoolStrategy(size=max(1, int(most)) if actors is None else actors),
            num_cpus=threads,
            num_gpus=int(on_gpu),
        )
        embedded.write_parquet(str(folder / ROWS), ray_remote_args={"num_cpus": 0})
    except ray.exceptions.RayError as error:
        raise InternVLError(
            f"Ray could not finish: {_last_line(error)}; --resume goes on after what is finished"
        ) from error
    finally:
        context.checkpoint_config = before


def _datasource(source: Source) -> Any:
    """Make Ray's form of a source: a task for each piece."""
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    class Pieces(Datasource):  # type: ignore[misc]
        def estimate_inmemory_data_size(self) -> None:
            return None

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[Any]:
            return [
                ReadTask(
                    partial(_blocks, piece),
                    BlockMetadata(
                        num_rows=piece.rows, size_bytes=None, input_files=None, exec_stats=None
                    ),
                )
                for piece in source.pieces
            ]

    return Pieces()


def _blocks(piece: Piece) -> Iterator[pa.Table]:
    for batch, _ in piece.batches(BLOCK):
        yield pa.Table.from_batches([batch])


def _files(rows: Path) -> list[Path]:
    return sorted(rows.glob("*.parquet")) if rows.is_dir() else []


def _count(rows: Path) -> int:
    """Count rows that are there, as far as they can be read."""
    total = 0
    for file in _files(rows):
        with contextlib.suppress(pa.ArrowException, OSError):
            total += pq.read_metadata(file).num_rows
    return total


def _checked(rows: Path, expected: int | None) -> tuple[int, int]:
    """Count rows and errors, and make sure that each row is there once.

    Args:
        rows: the folder of their files.
        expected: how many the source has; None: nobody knows.

    Raises:
        InternVLError: a process of an interrupted run went on writing, or one lost what it wrote.
    """
    if not _files(rows):
        return 0, 0
    paths = pq.read_table(rows, columns=[PATH]).column(PATH)
    twice = len(paths) - len(pc.unique(paths))
    if expected is not None and len(paths) - twice < expected:
        raise InternVLError(
            f"{rows}: {expected - len(paths) + twice} rows are missing; --force begins anew"
        )
    if twice:
        raise InternVLError(f"{rows}: {twice} rows are there twice; --force begins anew")
    return counted(rows)


def _publish(rows: Path, dest: Path, *, force: bool) -> None:
    """Give the rows their own name, in one step; with ``force``, they take that of what is there.

    Raises:
        UsageError: the folder is there by now, and not to be replaced.
    """
    limit_modes(rows)
    sync_tree(rows)
    try:
        rename_new(rows, dest)
    except FileExistsError as error:
        if not force:
            raise UsageError(
                f"{dest} was written by another run meanwhile; move it away, and pass --resume"
            ) from error
        exchange(rows, dest)
    sync(dest.parent)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


@contextmanager
def connected(address: str | None = None, *, quiet: bool = False) -> Iterator[None]:
    """Connect this process to a cluster for the length of a block.

    Args:
        address: of a cluster, or ``"auto"`` for the one of this machine; None: start a Ray of this
            machine alone, which ends with the block; its ports ask for Ray's token.
        quiet: show none of Ray's own progress and remarks.

    Raises:
        InternVLError: there is no such cluster.
    """
    require("ray")
    os.environ.setdefault(USAGE_STATS, "0")
    import ray
    import ray.data

    with contextlib.ExitStack() as ending:
        how: dict[str, Any] = {"address": address}
        if address is None:
            folder = ending.enter_context(
                tempfile.TemporaryDirectory(prefix="internvl-edge-ray-", ignore_cleanup_errors=True)
            )
            how = {
                "address": "local",
                "include_dashboard": False,
                "_temp_dir": folder,
            }
        try:
            ray.init(logging_level=logging.ERROR, log_to_driver=False, **how)
        except Exception as error:  # of a start that takes too long, it is no class of its own
            raise InternVLError(
                f"Ray at {address or 'this machine'}: {_last_line(error)}"
            ) from error
        ending.callback(ray.shutdown)
        if quiet:
            logging.getLogger("ray.data").setLevel(logging.ERROR)
            ray.data.DataContext.get_current().enable_progress_bars = False
        yield
