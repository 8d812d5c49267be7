"""The finished work of an interrupted compilation, kept next to OUT for the same command.

    .OUT.work/key.json             hashes of everything that decides the result
              journal.jsonl        a line per finished block, or piece of converted weights
              weights.safetensors  its weights, at the places they have in the end
              states/image.17      the samples' hidden states after it
              engines/             engines that were built

A journal line is written after what it speaks of was made durable, with the hashes of all of it; a
last line that was cut short is dropped. What is taken up is hashed again: a disk that lost pages
all the same, or a hand that changed something, is found, and then all of it is dropped. An engine
has its hash in its sidecar. The directory is the user's own, and nobody else's to write to (0700);
nothing in it is a link. Work under another key is never taken up: it is removed. The directory is
locked while a run is at work, so of two runs on one OUT the second is told at once. It goes when
the run succeeds, or fails with nothing finished. A run that dies between publishing and that leaves
in it the manifest of what it published, and the next one sees that it is done with.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal

from internvl_edge.artifact.components import WEIGHTS_FILE
from internvl_edge.artifact.manifest import MANIFEST
from internvl_edge.artifact.publish import hold, make_parents, placed
from internvl_edge.artifact.safetensors import TensorPlace, read_places
from internvl_edge.errors import UsageError, VerificationError
from internvl_edge.files.disk import (
    PRIVATE,
    empty,
    link_or_copy,
    make_private,
    open_regular,
    os_errors,
    strange_entry,
    write_atomically,
)
from internvl_edge.files.reading import is_there
from internvl_edge.files.spool import Budget, Spool

logger = logging.getLogger(__name__)

BLOCK_NBYTES = 512  # of st_blocks, stat(2)
CHUNK_NBYTES = 8 << 20
KEY, JOURNAL, STATES, ENGINES = "key.json", "journal.jsonl", "states", "engines"


class Workspace:
    """The work of one compilation: finished blocks and the states after the last, or pieces."""

    def __init__(self, path: Path, budget: Budget) -> None:
        self.path, self._budget = path, budget
        self._spools: list[Spool] = []
        (path / STATES).mkdir(exist_ok=True)
        (path / ENGINES).mkdir(exist_ok=True)
        self.entries = _read_journal(path / JOURNAL)
        taken = (saved["file"] for saved in self._latest().values())
        self._number = max((int(name.rpartition(".")[2]) for name in taken), default=0)
        self._drop_states()

    @property
    def num_done(self) -> int:
        """Blocks that are finished, or pieces of converted weights."""
        return len(self.entries)

    @property
    def is_calibrated(self) -> bool:
        """True where finished blocks are among it, which take longer than converting weights."""
        return any("activations" in entry for entry in self.entries)

    @property
    def weights(self) -> Path:
        """Where the weights are written."""
        return self.path / WEIGHTS_FILE

    @property
    def engines(self) -> Path:
        """Where finished engines are kept."""
        return self.path / ENGINES

    @property
    def is_worth_keeping(self) -> bool:
        """True where another run could save time with it."""
        return bool(self.entries) or any(self.engines.iterdir())

    def hidden(self, stream: str) -> Spool:
        """Make a new spool for a stream's hidden states; it stays if ``finish`` names it."""
        self._number += 1
        file = _open(self.path / STATES / f"{stream}.{self._number}", "x+b")
        return self._opened(Spool(file, self._budget, write_through=True))

    def restore(self, stream: str) -> Spool:
        """Open the hidden states that the last finished block of a stream left."""
        saved = self._latest()[stream]
        file = _open(self.path / STATES / saved["file"], "r+b")
        return self._opened(Spool.reopen(file, saved["shapes"], self._budget))

    def scratch(self) -> Spool:
        """Make a spool that leaves no file."""
        path = self.path / STATES / "scratch"
        file = _open(path, "x+b")
        path.unlink()
        return self._opened(Spool(file, self._budget))

    def publishing(self, directory: Path, name: str = MANIFEST) -> None:
        """Note the manifest of a directory that is about to be published: with it, work is done.

        Args:
            directory: what is about to be published.
            name: of a file that tells one from another, where it has no manifest.
        """
        (self.path / name).unlink(missing_ok=True)
        link_or_copy(directory / name, self.path / name)

    def hand_over(self, name: str, directory: Path) -> None:
        """Move a finished file to ``directory``; it stays here too if a file can have two names."""
        try:
            os.link(self.path / name, directory / name)
        except OSError:
            (self.path / JOURNAL).unlink(missing_ok=True)
            self.entries = []
            os.replace(self.path / name, directory / name)

    def forget(self) -> None:
        """Make this work worth nothing to another run: what it was made from has to change."""
        (self.path / JOURNAL).unlink(missing_ok=True)
        self.entries = []

    def close(self) -> None:
        """Close every file; what is finished stays."""
        for spool in self._spools:
            spool.close()

    def finish(self, block: str, entry: Mapping[str, Any], hidden: Mapping[str, Spool]) -> None:
        """Note a block as finished; its weights must be durable."""
        states = {}
        for stream, spool in hidden.items():
            spool.sync()
            states[stream] = {
                "file": Path(spool.name).name,
                "shapes": spool.shapes,
                "sha256": spool.sha256,
            }
        line = {"block": block, "states": states, **entry}
        with _open(self.path / JOURNAL, "ab") as journal:
            journal.write(json.dumps(line).encode() + b"\n")
            os.fsync(journal.fileno())
        self.entries.append(line)
        self._drop_states()

    def _opened(self, spool: Spool) -> Spool:
        self._spools = [*(s for s in self._spools if not s.is_closed), spool]
        return spool

    def _latest(self) -> dict[str, Any]:
        """Stream → its newest states."""
        return {s: saved for entry in self.entries for s, saved in entry["states"].items()}

    def _drop_states(self) -> None:
        kept = {saved["file"] for saved in self._latest().values()}
        # of a block that is under way, or of a tower that is entered
        kept |= {Path(spool.name).name for spool in self._spools if not spool.is_closed}
        for path in (self.path / STATES).iterdir():
            if path.name not in kept:
                path.unlink()


def _open(path: Path, mode: Literal["x+b", "r+b", "ab"]) -> BinaryIO:
    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    return open(path, mode, buffering=0, opener=opener)


def _read_journal(path: Path) -> list[dict[str, Any]]:
    """Read its whole lines; a last one that was cut short is removed."""
    if not is_there(path):
        return []
    with open_regular(path) as file:
        data = file.read()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def drop_published(out: Path, name: str = MANIFEST) -> None:
    """Remove the work on what ``out`` is, if the run that published it died before it could.

    Args:
        out: what was published.
        name: of the file that ``Workspace.publishing`` noted.
    """
    path = _work_on(placed(out))
    with suppress(OSError, UsageError), ExitStack() as cleanup:
        if (path / name).read_bytes() == (out / name).read_bytes():
            hold(path, cleanup)
            _remove(path)


def kept_nbytes(out: Path) -> int:
    """Count the bytes of the work on ``out``: to be taken up, or to be removed first.

    Of the weights file, which has its full size from the start, only what is written counts.
    """
    total = 0
    for folder, _, names in os.walk(_work_on(placed(out))):
        for name in names:
            with suppress(OSError):  # another run may be writing it
                total += (Path(folder) / name).stat().st_blocks * BLOCK_NBYTES
    return total


def _work_on(out: Path) -> Path:
    return out.with_name(f".{out.name}.work")


@contextmanager
def workspace(
    out: Path, key: Callable[[], Mapping[str, Any]], budget: Budget
) -> Iterator[Workspace]:
    """Open the work on ``out``, taken up where a dead run of the same key left it.

    Args:
        out: what will be published.
        key: asked once no other run can begin on ``out``: it may take a while.
        budget: of memory, for spools.

    Raises:
        UsageError: another run is writing ``out``, or nothing can be written next to it.
        ResourceError: the disk is full.
    """
    with ExitStack() as cleanup:
        with os_errors(out):
            out = placed(out)
            make_parents(out.parent, cleanup)
            path = _work_on(out)
            path.mkdir(mode=PRIVATE, exist_ok=True)
            try:
                descriptor = hold(path, cleanup)
            except UsageError as error:
                raise UsageError(
                    f"another run is writing {out}; wait until it is done, or choose another OUT"
                ) from error
            make_private(path, descriptor)
        try:
            wanted = key()
        except BaseException:
            with suppress(OSError):
                path.rmdir()  # unless another run's work is there
            raise
        with os_errors(out):
            _claim(path, wanted)
            _drop_damaged(path)
            work = Workspace(path, budget)
            cleanup.callback(work.close)
        try:
            yield work
        except BaseException as error:
            is_futile = isinstance(error, VerificationError) and not work.is_calibrated
            if work.is_worth_keeping and not is_futile:
                logger.warning(
                    "%d finished step(s) are kept in %s, %.2f GB; the same command goes on from "
                    "there",
                    work.num_done,
                    path,
                    kept_nbytes(out) / 1e9,
                )
            else:
                _remove(path)
            raise
        _remove(path)


def _drop_damaged(path: Path) -> None:
    """Drop the work unless everything that its journal speaks of has the hashes noted there."""
    try:
        problem = _damage(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = repr(error)
    if problem is None:
        return
    logger.warning("what an earlier run finished in %s is damaged, and dropped: %s", path, problem)
    wanted = (path / KEY).read_bytes()
    _empty(path)
    write_atomically(path / KEY, wanted)


def _damage(path: Path) -> str | None:
    if problem := strange_entry(path):
        return problem
    entries = _read_journal(path / JOURNAL)
    latest = {s: saved for entry in entries for s, saved in entry["states"].items()}
    for saved in latest.values():
        with open_regular(path / STATES / saved["file"]) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != saved["sha256"]:
                return f"{STATES}/{saved['file']} has another sha256"
    weights: dict[str, str] = {}
    for noted in entries:
        weights |= dict(noted.get("weights") or {})
    if weights:
        with open_regular(path / WEIGHTS_FILE) as file:
            places = read_places(file)
            for name, sha256 in weights.items():
                if _sha256_at(file, places[name]) != sha256:
                    return f"{WEIGHTS_FILE}: {name} has another sha256"
    return None


def _sha256_at(file: io.BufferedReader, place: TensorPlace) -> str:
    digest, left = hashlib.sha256(), place.nbytes
    file.seek(place.offset)
    while left and (piece := file.read(min(left, CHUNK_NBYTES))):
        digest.update(piece)
        left -= len(piece)
    return digest.hexdigest()


def _empty(path: Path) -> None:
    """Remove what is in the directory; the journal first, which speaks of the rest."""
    (path / JOURNAL).unlink(missing_ok=True)
    empty(path)


def _remove(path: Path) -> None:
    """Remove what it can; the journal first, or it would speak of what is not there any more."""
    with suppress(OSError):
        (path / JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(path)


def _claim(path: Path, key: Mapping[str, Any]) -> None:
    """Empty the directory unless its work has this key."""
    wanted = json.dumps(key, indent=1, sort_keys=True).encode() + b"\n"
    try:
        with open_regular(path / KEY) as file:
            if file.read(len(wanted) + 1) == wanted:
                return
    except OSError:
        pass
    if (path / JOURNAL).exists():
        logger.warning(
            "what another run with other options or inputs finished is dropped: %s", path
        )
    _empty(path)
    write_atomically(path / KEY, wanted)
