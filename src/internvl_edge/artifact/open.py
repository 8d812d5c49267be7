"""A compiled directory, opened: nothing in it reaches a native parser before it was checked.

Opening trusts the manifest alone, and checks everything else against it:
    every listed file is there, a regular file (no link, pipe or device) of its size and sha256;
        of the checkpoint's own shards, the header's sha256, so that opening never reads 12 GB;
    every graph is sound and points only into listed files, within their bounds (``onnx_gate``);
    every component's graph has the inputs and outputs that the manifest promises.

Files are opened relative to the directory's descriptor, never through a link, so a name cannot
lead out of it. What the manifest does not list is left alone and never opened: an engine build
that died may leave such a file, as may a file browser, and it does no harm where nothing reads it.

Reads with ``read`` and never by mapping: a mapped file that another process truncates kills.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from internvl_edge.artifact.manifest import (
    MANIFEST,
    MAX_NBYTES,
    SCHEMA_VERSION,
    ComponentRecord,
    EngineRecord,
    FileRecord,
    Manifest,
    TensorSpec,
)
from internvl_edge.artifact.onnx_gate import scan
from internvl_edge.artifact.onnx_wire import MAX_NBYTES as MAX_ONNX_NBYTES
from internvl_edge.artifact.safetensors import header_sha256
from internvl_edge.errors import ArtifactError, UsageError
from internvl_edge.files.disk import FOLDER_FLAGS, open_regular

__all__ = [
    "MANIFEST",
    "SCHEMA_VERSION",
    "Artifact",
    "ComponentRecord",
    "EngineRecord",
    "FileRecord",
    "Manifest",
    "TensorSpec",
    "open_artifact",
]

CHECKPOINT_FILE = "config.json"  # of what is not compiled yet
HASHING_THREADS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A compiled directory that was found to be what its manifest says."""

    path: Path
    manifest: Manifest

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
        ArtifactError: it is no such directory, or a file is not what the manifest says.
    """
    path = Path(path)
    try:
        directory = _open_directory(path)
        try:
            manifest = _read_manifest(path, directory)
            _check_files(path, directory, manifest.files, hash_files, whole)
            _check_graphs(path, directory, manifest)
        finally:
            os.close(directory)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error
    return Artifact(path=path, manifest=manifest)


def sha256(file: io.BufferedReader) -> str:
    """Hash a file from its beginning, in bounded memory."""
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def _open_directory(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ArtifactError(
            f"{path}: expected a directory written by internvl-edge export: {error.strerror}"
        ) from error


def _read_manifest(path: Path, directory: int) -> Manifest:
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
        return Manifest.from_bytes(data)
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
        raise ArtifactError(
            f"{path / name}: expected a regular file: {error.strerror}; export again"
        ) from error


def _check_files(
    path: Path, directory: int, files: dict[str, FileRecord], hashed: bool, whole: bool
) -> None:
    """Check kind and size of all files first, then their bytes, the largest first."""
    names = sorted(files, key=lambda name: -files[name].nbytes)
    for name in names:
        with _open(path, directory, name) as file:
            _check_size(path / name, file, files[name])
    if hashed or whole:
        with ThreadPoolExecutor(HASHING_THREADS) as pool:
            checks = [
                pool.submit(_check_hashes, path, directory, name, files[name], whole)
                for name in names
            ]
            for check in checks:
                check.result()


def _check_size(path: Path, file: io.BufferedReader, record: FileRecord) -> None:
    nbytes = os.fstat(file.fileno()).st_size
    if nbytes != record.nbytes:
        raise ArtifactError(
            f"{path}: {MANIFEST} says {record.nbytes} bytes, it has {nbytes}; export again"
        )


def _check_hashes(path: Path, directory: int, name: str, record: FileRecord, whole: bool) -> None:
    """Check the header's hash if there is one; the file's if it is the only one or asked for.

    Raises:
        ArtifactError: another one than the manifest has.
    """
    expected: dict[str, tuple[str, Callable[[io.BufferedReader], str]]] = {}
    if record.header_sha256 is not None:
        expected["header_sha256"] = record.header_sha256, header_sha256
    if record.sha256 is not None and (whole or record.header_sha256 is None):
        expected["sha256"] = record.sha256, sha256
    with _open(path, directory, name) as file:
        _check_size(path / name, file, record)
        for key, (promised, measure) in expected.items():
            if (found := measure(file)) != promised:
                raise ArtifactError(
                    f"{path / name}: {MANIFEST} says {key} {promised}, it has {found}: "
                    "the file was changed; export again"
                )


def _check_graphs(path: Path, directory: int, manifest: Manifest) -> None:
    """Scan every graph, those that engines are built from too."""
    sizes = {name: record.nbytes for name, record in manifest.files.items()}
    promised = {record.file: record for record in manifest.components.values()}
    for name in sorted({*promised, *(n for n in sizes if n.endswith(".onnx"))}):
        if sizes[name] > MAX_ONNX_NBYTES:
            raise ArtifactError(f"{path / name}: more than {MAX_ONNX_NBYTES} bytes")
        with _open(path, directory, name) as file:
            data = file.read(sizes[name])
        summary = scan(data, files=sizes, where=str(path / name))
        if name in promised:
            record = promised[name]
            _check_names(path / name, "inputs", record.inputs, summary.inputs)
            _check_names(path / name, "outputs", record.outputs, summary.outputs)


def _check_names(
    path: Path, which: str, specs: tuple[TensorSpec, ...], found: tuple[str, ...]
) -> None:
    promised = tuple(spec.name for spec in specs)
    if promised != found:
        raise ArtifactError(f"{path}: {MANIFEST} promises {which} {promised}, it has {found}")
