"""``manifest.json``: what a compiled directory is, and every file that belongs to it.

Written once, last, in one canonical form (fields in the order of these classes, files by name,
two spaces, ASCII). Read as from a stranger: exact types, no unknown, missing or repeated key, no
NaN, every file name a plain one, every reference to a file one that is listed.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from internvl_edge.errors import ArtifactError
from internvl_edge.files.reading import parse_json

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
CHECKPOINT_FILE = "config.json"  # of what is not compiled yet
MAX_NBYTES = 16 * 2**20
FOLDERS = ("engines", "reports")  # the only ones a directory may have
SHARD_SUFFIX = ".safetensors"
DTYPES = {"bool", "float16", "bfloat16", "float32", "float64"}
DTYPES |= {f"{sign}int{bits}" for sign in ("", "u") for bits in (4, 8, 16, 32, 64)}
DTYPES |= {"float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn"}
NONE = type(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """An input or output of a component."""

    name: str
    dtype: str  # numpy's or ml_dtypes' name: "float32", "bfloat16", "int64"
    shape: tuple[int | str, ...]  # a string is a dimension decided at run time, such as "batch"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """A regular file of the directory.

    A checkpoint's shard that was brought without reading it is known by its header, which lists
    every tensor and its place; by its whole hash too once that is known. Others by that alone.
    """

    nbytes: int
    sha256: str | None  # None: not known, there is a header_sha256
    header_sha256: str | None = None  # of a shard's JSON header; None: the file was read whole


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentRecord:
    """One ONNX graph, and how it was found to compute."""

    file: str  # "vision.onnx"
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    nbytes: int  # of weights that it reads
    verification: dict[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRecord:
    """One engine built from a component."""

    component: str
    target: str  # "tensorrt-rtx" or "tensorrt"
    file: str  # "engines/vision.tensorrt-rtx-1a2b3c4d.plan"
    sidecar: str  # its .json: versions, profile, what it was built from


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything a compiled directory says of itself."""

    tool_version: str
    precision: str
    model: dict[str, Any]  # the checkpoint's configuration
    image_size: int
    preprocessing: dict[str, Any]
    recipe: dict[str, Any] | None  # None: nothing is quantized
    source: dict[str, Any]  # the checkpoint's name, its files' fingerprints, how they came
    components: dict[str, ComponentRecord]
    engines: tuple[EngineRecord, ...] = ()
    files: dict[str, FileRecord]  # every file but the manifest itself
    schema_version: int = SCHEMA_VERSION

    @property
    def hard_links(self) -> tuple[str, ...]:
        """Weights files that were written as a second name of the checkpoint's own."""
        weights = self.source.get("weights")
        if type(weights) is not dict:
            return ()
        return tuple(name for name, how in weights.items() if how == "hard link")

    @property
    def language_model(self) -> dict[str, Any] | None:
        """The configuration of the language model; None where there is none."""
        internvl, chat = self.model.get("internvl"), self.model.get("chat")
        language = internvl["qllama"] if internvl else chat["llama"] if chat else None
        return None if language is None else dict(language)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; the schema version first, files by name."""
        fields = asdict(replace(self, files=dict(sorted(self.files.items()))))
        return {"schema_version": fields.pop("schema_version"), **_lists(fields)}

    def to_bytes(self) -> bytes:
        """Return the canonical text of ``manifest.json``."""
        return (json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n").encode("ascii")

    @classmethod
    def from_json(cls, raw: Any) -> Manifest:
        """Make the manifest that JSON values describe.

        Raises:
            ArtifactError: a key, a type or a reference is not as it must be.
        """
        _check_version(raw)
        kinds = {
            "schema_version": int,
            "tool_version": str,
            "precision": str,
            "model": dict,
            "image_size": int,
            "preprocessing": dict,
            "recipe": (dict, NONE),
            "source": dict,
            "components": dict,
            "engines": list,
            "files": dict,
        }
        fields = _fields(raw, "manifest", kinds)
        fields["components"] = {
            name: _component(record, f"components[{name!r}]")
            for name, record in fields["components"].items()
        }
        fields["files"] = {name: _file(name, record) for name, record in fields["files"].items()}
        fields["engines"] = tuple(
            EngineRecord(**_fields(record, f"engines[{i}]", dict.fromkeys(ENGINE_KEYS, str)))
            for i, record in enumerate(fields["engines"])
        )
        manifest = cls(**fields)
        _check_references(manifest)
        return manifest

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read the manifest from the bytes of ``manifest.json``.

        Raises:
            ArtifactError: it is not JSON, or ``from_json`` refuses it.
        """
        if len(data) > MAX_NBYTES:
            raise ArtifactError(f"more than {MAX_NBYTES} bytes")
        try:
            raw = parse_json(data, unique=True, constants=False)
        except ValueError as error:
            raise ArtifactError(f"not JSON in UTF-8: {error}") from error
        return cls.from_json(raw)


ENGINE_KEYS = ("component", "target", "file", "sidecar")


def check_name(name: str) -> None:
    """Refuse a file name that is not ``file`` or ``folder/file`` of an artifact directory."""
    folder, slash, base = name.rpartition("/")
    if slash and folder not in FOLDERS:
        raise ArtifactError(f"{name!r}: files lie in the directory itself or in {FOLDERS}")
    if not base.isprintable() or "\\" in base or base in ("", ".", "..") or name == MANIFEST:
        raise ArtifactError(f"{name!r} is not a plain file name")


def _check_version(raw: Any) -> None:
    version = raw.get("schema_version") if type(raw) is dict else None
    if type(version) is not int or version < 1:
        raise ArtifactError("not a manifest of internvl-edge: no schema_version")
    if version > SCHEMA_VERSION:
        raise ArtifactError(
            f"schema version {version} is newer than this internvl-edge knows "
            f"({SCHEMA_VERSION}); upgrade internvl-edge"
        )


def _check_references(manifest: Manifest) -> None:
    if not manifest.components or manifest.image_size < 1:
        raise ArtifactError("expected at least one component and a positive image_size")
    for name, record in manifest.components.items():
        if not name.isidentifier() or record.file not in manifest.files or "/" in record.file:
            raise ArtifactError(f"component {name!r}: its file {record.file!r} is not listed")
    for engine in manifest.engines:
        missing = {engine.file, engine.sidecar} - set(manifest.files)
        if missing or engine.component not in manifest.components:
            raise ArtifactError(
                f"engine {engine.file!r} of {engine.component!r}: its component, or a file of "
                f"{sorted({engine.file, engine.sidecar})}, is not listed"
            )


def _component(raw: Any, where: str) -> ComponentRecord:
    kinds = {"file": str, "inputs": list, "outputs": list, "nbytes": int}
    fields = _fields(raw, where, {**kinds, "verification": (dict, NONE)})
    for which in ("inputs", "outputs"):
        specs = (_spec(spec, f"{where}.{which}[{i}]") for i, spec in enumerate(fields[which]))
        fields[which] = tuple(specs)
    _natural(fields["nbytes"], where)
    return ComponentRecord(**fields)


def _spec(raw: Any, where: str) -> TensorSpec:
    fields = _fields(raw, where, {"name": str, "dtype": str, "shape": list})
    if fields["dtype"] not in DTYPES:
        raise ArtifactError(f"{where}: unknown dtype {fields['dtype']!r}")
    for dimension in fields["shape"]:
        if type(dimension) is not str:
            _natural(dimension, where)
    return TensorSpec(name=fields["name"], dtype=fields["dtype"], shape=tuple(fields["shape"]))


def _file(name: str, raw: Any) -> FileRecord:
    check_name(name)
    where = f"files[{name!r}]"
    hashes = ("sha256", "header_sha256")
    fields = _fields(raw, where, {"nbytes": int, **dict.fromkeys(hashes, (str, NONE))})
    _natural(fields["nbytes"], where)
    for key in hashes:
        if fields[key] is not None and not re.fullmatch("[0-9a-f]{64}", fields[key]):
            raise ArtifactError(f"{where}: {key} must be 64 lower-case hexadecimal digits")
    if fields["header_sha256"] is None and fields["sha256"] is None:
        raise ArtifactError(f"{where}: expected a sha256, or a header_sha256, or both")
    if fields["header_sha256"] is not None and ("/" in name or not name.endswith(SHARD_SUFFIX)):
        raise ArtifactError(f"{where}: only *{SHARD_SUFFIX} files may have a header_sha256")
    return FileRecord(**fields)


def _fields(raw: Any, where: str, kinds: dict[str, Any]) -> dict[str, Any]:
    """Return the values of an object that has exactly these keys, of exactly these types."""
    if type(raw) is not dict:
        raise ArtifactError(f"{where}: expected an object, found {type(raw).__name__}")
    unknown, missing = sorted(set(raw) - set(kinds)), sorted(set(kinds) - set(raw))
    if unknown or missing:
        raise ArtifactError(f"{where}: unknown keys {unknown}, missing keys {missing}")
    for name, kind in kinds.items():
        allowed = kind if type(kind) is tuple else (kind,)
        if type(raw[name]) not in allowed:
            names = " or ".join("null" if k is NONE else k.__name__ for k in allowed)
            raise ArtifactError(
                f"{where}.{name}: expected {names}, found {type(raw[name]).__name__}"
            )
    return dict(raw)


def _natural(value: Any, where: str) -> None:
    if type(value) is not int or value < 0:
        raise ArtifactError(f"{where}: expected a whole number from 0, found {value!r}")


def _lists(value: Any) -> Any:
    """Turn tuples into lists, as JSON has them."""
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value
