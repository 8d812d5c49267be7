"""A compiled directory, opened: nothing in it reaches a native parser before it was checked.

Opening trusts the manifest alone, and checks everything else against it:
    every listed file is there, a regular file (no link, pipe or device) of its size and sha256;
        of the checkpoint's own shards, the header's sha256, so that opening never reads 12 GB;
    every graph is sound and points only into listed files, within their bounds (``onnx_gate``);
    every component's graph has the inputs and outputs that the manifest promises.

Files are opened relative to the directory's descriptor, never through a link, so a name cannot
lead out of it. What the manifest does not list is left alone and never opened: an engine build
that died may leave such a file, as may a file browser, and it does no harm where nothing reads it.

What was checked is remembered (``pins``) and compared when it is used, so that nothing runs of a
directory that was replaced or altered in the meantime, and nothing is a mixture of two.

Reads with ``read`` and never by mapping: a mapped file that another process truncates kills.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from internvl_edge.artifact.manifest import (
    CHECKPOINT_FILE,
    MANIFEST,
    MAX_NBYTES,
    EngineRecord,
    FileRecord,
    Manifest,
    TensorSpec,
)
from internvl_edge.artifact.onnx_gate import scan
from internvl_edge.artifact.onnx_wire import MAX_NBYTES as MAX_ONNX_NBYTES
from internvl_edge.artifact.pins import Pin, Watch, changed
from internvl_edge.artifact.safetensors import header_sha256
from internvl_edge.artifact.schema import check_schema
from internvl_edge.errors import ArtifactError, UsageError, shortened
from internvl_edge.files.disk import EXHAUSTED, FOLDER_FLAGS, link_or_copy, open_regular, translated

__all__ = ["Artifact", "open_artifact", "sha256"]

HASHING_THREADS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A compiled directory that was found to be what its manifest says."""

    path: Path
    manifest: Manifest
    digest: str = field(default="", compare=False)  # sha256 of manifest.json
    # File → what it was when it was verified; a file that has none is verified when it is used.
    pins: dict[str, Pin] = field(default_factory=dict, compare=False, repr=False)
    # Graph → the files that its tensors lie in.
    weights: dict[str, tuple[str, ...]] = field(default_factory=dict, compare=False, repr=False)

    def onnx_path(self, component: str) -> Path:
        """Return the path of a component's graph.

        Raises:
            UsageError: the directory has no such component.
        """
        components = self.manifest.components
        if component not in components:
            raise UsageError(f"{self.path} has no {component!r}, only {', '.join(components)}")
        return self.file(components[component].file)

    def file(self, name: str) -> Path:
        """Return the path of a listed file.

        Raises:
            ArtifactError: it is not listed.
        """
        if name not in self.manifest.files:
            raise ArtifactError(f"{self.path}: {MANIFEST} lists no {name!r}; export again")
        return self.path / name

    def has(self, name: str) -> bool:
        """Tell whether a file is listed; what is not listed does not exist."""
        return name in self.manifest.files

    def require_digest(self, digest: str) -> None:
        """Make sure that it is the directory that another process opened.

        Raises:
            ArtifactError: its manifest is another one.
        """
        if self.digest != digest:
            raise changed(self.path, "its manifest is another one than where the model came from")

    def read(self, name: str, limit: int) -> bytes:
        """Read a listed file, which must still have the manifest's hash.

        Raises:
            ArtifactError: it is not listed, above ``limit`` bytes, or no longer what was opened.
        """
        path, record = self.file(name), self.manifest.files[name]
        if record.nbytes > limit:
            raise ArtifactError(
                f"{path}: expected at most {limit:,} bytes, found {record.nbytes:,}"
            )
        with self._now() as directory, _open(self.path, directory, name) as file:
            data = file.read(record.nbytes + 1)
        if len(data) != record.nbytes or hashlib.sha256(data).hexdigest() != record.sha256:
            raise changed(self.path, f"{name} is another file")
        return data

    def watched(self, *names: str) -> Watch:
        """Open listed files that are still what was verified; close what is returned.

        Raises:
            ArtifactError: one is not listed, or no longer what was opened.
        """
        with self._now() as directory:
            return self._watched(directory, names)

    def bring(self, name: str, target: Path) -> None:
        """Give a listed file a second name, a hard link where there can be one, else a copy.

        Raises:
            ArtifactError: it is not listed, or no longer what was opened.
            OSError: the file cannot be written.
        """
        with closing(self.watched(name)) as watch:
            link_or_copy(self.path / name, target)
            with open_regular(target) as file:
                if Pin.of(file).has_content_of(watch.pins[name]):
                    return  # the very file
                try:
                    _check_content(target, file, self.manifest.files[name], whole=True)
                except ArtifactError as error:
                    raise changed(self.path, f"{name} is another file") from error

    @contextmanager
    def held(self, graph: str) -> Iterator[tuple[Path, Watch]]:
        """Give the folder to open a graph in by name, and the watch over its weights.

        The watch is the caller's to close; else as ``holding``.
        """
        with self._now() as directory, closing(self._watched(directory, [graph])) as own:
            names = self._weights_of(graph, own)
        with ExitStack() as stack:
            watch = self.watched(*names)
            stack.callback(watch.close)
            with self.holding(graph, *names) as folder:
                yield folder, watch
            with self._now() as directory:
                is_other = self._differs(directory, watch.pins)  # not what was mapped meanwhile
            if is_other:
                raise changed(self.path, f"while {graph} was opened")
            stack.pop_all()

    @contextmanager
    def holding(self, *names: str) -> Iterator[Path]:
        """Give the folder to open listed files in by name.

        It is this process's own way to the directory, which no rename and no link turns to another
        one; the files are compared before the block and after it.

        Raises:
            ArtifactError: one is not listed, or the directory is no longer what was opened.
        """
        with self._now() as directory:
            with closing(self._watched(directory, names)) as watch:
                pins = watch.pins
            folder = Path(f"/proc/self/fd/{directory}")
            folder = folder if folder.is_dir() else self.path
            try:
                yield folder
            except Exception as error:
                if self._differs(directory, pins):
                    raise changed(self.path, f"while {names[0]} was opened") from error
                if isinstance(error, ArtifactError):
                    message = str(error).replace(f"{folder}/", f"{self.path}/")
                    raise ArtifactError(message) from error
                raise
            if self._differs(directory, pins):
                raise changed(self.path, f"while {names[0]} was opened")

    @contextmanager
    def _now(self) -> Iterator[int]:
        """Open the directory again; what can no longer be opened has changed."""
        try:
            directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in EXHAUSTED:
                raise translated(error, self.path) from error
            raise changed(self.path, error.strerror or str(error)) from error
        try:
            yield directory
        finally:
            os.close(directory)

    def _watched(self, directory: int, names: Sequence[str]) -> Watch:
        with ExitStack() as stack:
            files = {}
            for name in names:
                self.file(name)
                try:
                    file = stack.enter_context(_open(self.path, directory, name))
                    self._require_verified(name, file)
                except ArtifactError as error:
                    raise changed(self.path, f"{name} is another file") from error
                files[name] = file
            stack.pop_all()
        return Watch(self.path, files)

    def _require_verified(self, name: str, file: io.BufferedReader) -> None:
        """Compare a file with its pin; where it has none, or another file has its place, verify."""
        pin, now = self.pins.get(name), Pin.of(file)
        if pin is not None and now.has_content_of(pin):
            return
        record = self.manifest.files[name]
        if pin is not None and record.sha256 is None:
            raise ArtifactError("its header alone is known")
        _check_content(self.path / name, file, record, whole=True)
        self.pins[name] = now

    def _weights_of(self, graph: str, own: Watch) -> tuple[str, ...]:
        if graph not in self.weights:
            sizes = {name: record.nbytes for name, record in self.manifest.files.items()}
            own.files[graph].seek(0)
            data = own.files[graph].read(MAX_ONNX_NBYTES + 1)
            self.weights[graph] = scan(data, files=sizes, where=graph).external_locations
        return self.weights[graph]

    def _differs(self, directory: int, pins: Mapping[str, Pin]) -> bool:
        try:
            for name, pin in pins.items():
                with _open(self.path, directory, name) as file:
                    if Pin.of(file) != pin:
                        return True
        except ArtifactError:
            return True
        return False

    def engines(self, component: str, target: str | None = None) -> list[EngineRecord]:
        """List engines of a component, of one target or of all, in the order they were built."""
        return [
            engine
            for engine in self.manifest.engines
            if engine.component == component and target in (None, engine.target)
        ]


def open_artifact(
    path: str | os.PathLike[str], *, hash_files: bool = True, whole: bool = False
) -> Artifact:
    """Open a compiled directory.

    Args:
        path: the directory; it may be a link to one.
        hash_files: compare the sha256 of every file, of linked shards that of the header;
            without it, only kind and size.
        whole: of linked shards too, compare the sha256 of the whole file, where it is known.

    Raises:
        UsageError: it is no path.
        ArtifactError: it is no such directory, or a file is not what the manifest says.
    """
    try:
        path = Path(os.fsdecode(path))
    except TypeError as error:
        raise UsageError(
            f"{shortened(path)}: expected the path of a compiled directory, found "
            f"{type(path).__name__}"
        ) from error
    try:
        directory = _open_directory(path)
        try:
            manifest, digest = _read_manifest(path, directory)
            pins = _check_files(path, directory, manifest.files, hash_files, whole)
            weights = _check_graphs(path, directory, manifest, pins)
        finally:
            os.close(directory)
    except OSError as error:
        if error.errno in EXHAUSTED:
            raise translated(error, path) from error
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error
    return Artifact(path=path, manifest=manifest, digest=digest, pins=pins, weights=weights)


def sha256(file: io.BufferedReader) -> str:
    """Hash a file from its beginning, in bounded memory."""
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def _open_directory(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in EXHAUSTED:
            raise translated(error, path) from error
        raise ArtifactError(
            f"{path}: expected a directory written by internvl-edge export: {error.strerror}"
        ) from error


def _read_manifest(path: Path, directory: int) -> tuple[Manifest, str]:
    if not _has(directory, MANIFEST):
        if _has(directory, CHECKPOINT_FILE):
            raise ArtifactError(
                f"{path} is a checkpoint: it has {CHECKPOINT_FILE} and no {MANIFEST}; compile it, "
                f"internvl-edge export {path} -o OUT, and name OUT"
            )
        raise ArtifactError(
            f"{path} is no compiled directory: it has no {MANIFEST}; make one, internvl-edge "
            "export CHECKPOINT -o OUT, and name OUT"
        )
    with _open(path, directory, MANIFEST) as file:
        data = file.read(MAX_NBYTES + 1)
    try:
        manifest = Manifest.from_bytes(data)
        check_schema(manifest)
        return manifest, hashlib.sha256(data).hexdigest()
    except ArtifactError as error:
        raise ArtifactError(f"{path / MANIFEST}: {error}") from error


def _has(directory: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _open(path: Path, directory: int, name: str) -> io.BufferedReader:
    """Open a listed file, reached through no link."""
    folder, _, base = name.rpartition("/")
    try:
        if not folder:
            return open_regular(base, directory=directory)
        parent = os.open(folder, FOLDER_FLAGS, dir_fd=directory)
        try:
            return open_regular(base, directory=parent)
        finally:
            os.close(parent)
    except OSError as error:
        if error.errno in EXHAUSTED:  # not the file's fault
            raise translated(error, path / name) from error
        raise ArtifactError(
            f"{path / name}: expected a regular file: {error.strerror}; export again"
        ) from error


def _check_files(
    path: Path, directory: int, files: dict[str, FileRecord], hashed: bool, whole: bool
) -> dict[str, Pin]:
    """Check kind and size of all files first, then their bytes, the largest first.

    Returns:
        What identifies each file whose bytes were checked.
    """
    names = sorted(files, key=lambda name: -files[name].nbytes)
    for name in names:
        with _open(path, directory, name) as file:
            _check_size(path / name, file, files[name])
    if not hashed and not whole:
        return {}
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        checks = {
            name: pool.submit(_check_hashes, path, directory, name, files[name], whole)
            for name in names
        }
        return {name: check.result() for name, check in checks.items()}


def _check_size(path: Path, file: io.BufferedReader, record: FileRecord) -> None:
    nbytes = os.fstat(file.fileno()).st_size
    if nbytes != record.nbytes:
        raise ArtifactError(
            f"{path}: {MANIFEST} says {record.nbytes} bytes, it has {nbytes}; export again"
        )


def _check_hashes(path: Path, directory: int, name: str, record: FileRecord, whole: bool) -> Pin:
    with _open(path, directory, name) as file:
        before = Pin.of(file)
        _check_content(path / name, file, record, whole=whole)
        if not Pin.of(file).has_content_of(before):
            raise ArtifactError(
                f"{path / name}: was written to while it was checked; open it again"
            )
    return before


def _check_content(path: Path, file: io.BufferedReader, record: FileRecord, *, whole: bool) -> None:
    """Check the header's hash if there is one; the file's if it is the only one or asked for.

    Raises:
        ArtifactError: another one than the manifest has.
    """
    expected: dict[str, tuple[str, Callable[[io.BufferedReader], str]]] = {}
    if record.header_sha256 is not None:
        expected["header_sha256"] = record.header_sha256, header_sha256
    if record.sha256 is not None and (whole or record.header_sha256 is None):
        expected["sha256"] = record.sha256, sha256
    _check_size(path, file, record)
    for key, (promised, measure) in expected.items():
        if (found := measure(file)) != promised:
            raise ArtifactError(
                f"{path}: {MANIFEST} says {key} {promised}, it has {found}: "
                "the file was changed; export again"
            )


def _check_graphs(
    path: Path, directory: int, manifest: Manifest, pins: Mapping[str, Pin]
) -> dict[str, tuple[str, ...]]:
    """Scan every graph, those that engines are built from too: the weights files of each."""
    weights = {}
    sizes = {name: record.nbytes for name, record in manifest.files.items()}
    promised = {record.file: record for record in manifest.components.values()}
    for name in sorted({*promised, *(n for n in sizes if n.endswith(".onnx"))}):
        if sizes[name] > MAX_ONNX_NBYTES:
            raise ArtifactError(f"{path / name}: more than {MAX_ONNX_NBYTES} bytes")
        with _open(path, directory, name) as file:
            data = file.read(sizes[name])
            if name in pins and not Pin.of(file).has_content_of(pins[name]):
                raise ArtifactError(
                    f"{path / name}: was replaced while it was checked; open it again"
                )
        summary = scan(data, files=sizes, where=str(path / name))
        weights[name] = summary.external_locations
        if name in promised:
            record = promised[name]
            _check_names(path / name, "inputs", record.inputs, summary.inputs)
            _check_names(path / name, "outputs", record.outputs, summary.outputs)
    return weights


def _check_names(
    path: Path, which: str, specs: tuple[TensorSpec, ...], found: tuple[str, ...]
) -> None:
    promised = tuple(spec.name for spec in specs)
    if promised != found:
        raise ArtifactError(f"{path}: {MANIFEST} promises {which} {promised}, it has {found}")
