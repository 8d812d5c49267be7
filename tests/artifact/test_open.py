"""Compiled directories: what is written can be read, what is not ours or was changed cannot."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.artifacts import (
    ENGINE,
    MODEL,
    SIDECAR,
    contents,
    file_record,
    manifest_of,
    write_artifact,
)

from internvl_edge.artifact.manifest import (
    ComponentRecord,
    EngineRecord,
    FileRecord,
    Manifest,
    TensorSpec,
)
from internvl_edge.artifact.open import Artifact, open_artifact
from internvl_edge.errors import ArtifactError, ResourceError, UsageError

GOLDEN = """{
  "schema_version": 1,
  "tool_version": "0.1.0",
  "precision": "fp32",
  "model": {
    "kind": "vision"
  },
  "image_size": 28,
  "preprocessing": {},
  "recipe": null,
  "source": {
    "checkpoint": "\\u5c0f"
  },
  "components": {
    "vision": {
      "file": "vision.onnx",
      "inputs": [
        {
          "name": "x",
          "dtype": "float32",
          "shape": [
            "batch",
            4
          ]
        }
      ],
      "outputs": [],
      "nbytes": 128,
      "verification": null
    }
  },
  "engines": [
    {
      "component": "vision",
      "target": "tensorrt",
      "file": "engines/v.plan",
      "sidecar": "engines/v.json"
    }
  ],
  "files": {
    "engines/v.json": {
      "nbytes": 2,
      "sha256": "%(a)s",
      "header_sha256": null
    },
    "engines/v.plan": {
      "nbytes": 3,
      "sha256": "%(a)s",
      "header_sha256": null
    },
    "vision.onnx": {
      "nbytes": 0,
      "sha256": "%(b)s",
      "header_sha256": null
    },
    "w.safetensors": {
      "nbytes": 9,
      "sha256": null,
      "header_sha256": "%(a)s"
    }
  }
}
""" % {"a": "a" * 64, "b": "0" * 64}  # noqa: UP031


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return write_artifact(tmp_path / "out", contents(engine=b"plan"))


def refused(path: Path, message: str, **options: bool) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        open_artifact(path, **options)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value) and "\0" not in str(caught.value)


# --- opening -------------------------------------------------------------------------------------


def test_open(out: Path) -> None:
    artifact = open_artifact(out)
    assert artifact == Artifact(path=out, manifest=manifest_of(contents(engine=b"plan")))
    assert artifact.onnx_path("vision") == out / "vision.onnx"
    assert artifact.file(SIDECAR).read_bytes() == b"{}"
    assert [e.file for e in artifact.engines("vision")] == [ENGINE]
    assert artifact.engines("vision", "tensorrt-rtx") == artifact.engines("vision")
    assert artifact.engines("vision", "tensorrt") == artifact.engines("matcher") == []
    with pytest.raises(UsageError, match="no 'matcher', only vision"):
        artifact.onnx_path("matcher")
    with pytest.raises(ArtifactError, match=r"lists no 'tokenizer\.model'"):
        artifact.file("tokenizer.model")


def test_the_model_of_these_tests_is_onnx() -> None:
    model = onnx.load_from_string(MODEL)
    assert [node.op_type for node in model.graph.node] == ["MatMul", "Relu"]
    assert model.graph.initializer[0].external_data[1].value == "64"


def test_open_through_a_link_and_by_string(out: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(out)
    assert open_artifact(str(tmp_path / "link")).manifest == open_artifact(out).manifest


def test_no_descriptor_stays_open(out: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        open_artifact(out)
    (out / ENGINE).unlink()
    for _ in range(20):
        refused(out, "No such file")
    assert len(os.listdir("/proc/self/fd")) == before


def test_unlisted_files_are_never_opened(out: Path) -> None:
    os.mkfifo(out / "pipe")
    (out / "notes.onnx").write_bytes(b"not a model")
    (out / "secret").symlink_to("/dev/zero")
    open_artifact(out)


# --- files that are not what the manifest says ---------------------------------------------------


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _socket(path: Path) -> None:
    path.unlink()
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)
    os.chdir(here)


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    path.rename(path.parent.parent / "elsewhere")
    make(path)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "No such file"),
    "longer": (lambda p: p.write_bytes(p.read_bytes() + b"\0"), r"says \d+ bytes, it has \d+"),
    "shorter": (lambda p: os.truncate(p, 0), "it has 0"),
    "symlink": (lambda p: _replace(p, lambda q: q.symlink_to("../elsewhere")), "regular file"),
    "symlink to a device": (lambda p: _replace(p, lambda q: q.symlink_to("/dev/zero")), "regular"),
    "dangling symlink": (lambda p: _replace(p, lambda q: q.symlink_to("nowhere")), "regular file"),
    "pipe": (lambda p: _replace(p, os.mkfifo), "not a regular file"),
    "directory": (lambda p: _replace(p, Path.mkdir), "not a regular file"),
    "socket": (_socket, "regular file"),
}


@pytest.mark.parametrize("name", ["vision.onnx", "weights.bin", "README.md", ENGINE, SIDECAR])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_files(out: Path, name: str, change: str) -> None:
    apply, message = CHANGES[change]
    apply(out / name)
    start = time.monotonic()
    refused(out, f"{name}.*{message}", hash_files=False)
    refused(out, f"{name}.*{message}")
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("name", ["vision.onnx", "weights.bin", "README.md", ENGINE, SIDECAR])
def test_changed_bytes(out: Path, name: str) -> None:
    _flip(out / name)
    refused(out, f"{name}.*the file was changed; export again")


def test_without_hashing_bytes_are_not_compared(out: Path) -> None:
    _flip(out / "weights.bin")
    open_artifact(out, hash_files=False)


def test_folder_of_engines_is_a_link(out: Path) -> None:
    (out / "engines").rename(out.parent / "moved")
    (out / "engines").symlink_to("../moved")
    refused(out, "plan: expected a regular file")


def test_file_swapped_for_a_link_all_the_while(out: Path) -> None:
    """Whatever is opened lies in the directory, at whatever moment the swap comes."""
    (out.parent / "secret").write_bytes(bytes(192))  # as the manifest has it
    (out / "link").symlink_to("../secret")
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            os.rename(out / "weights.bin", out / "real")
            os.rename(out / "link", out / "weights.bin")
            os.rename(out / "weights.bin", out / "link")
            os.rename(out / "real", out / "weights.bin")

    opened: list[str] = []
    real_open, real_fstat = os.open, os.fstat

    def watching(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        descriptor = real_open(path, flags, *args, **kwargs)
        if path == "weights.bin":
            inode = real_fstat(descriptor).st_ino
            opened.append("outside" if inode == secret else "inside")
        return descriptor

    secret = (out.parent / "secret").stat().st_ino
    thread = threading.Thread(target=swap)
    thread.start()
    tries, end = 0, time.monotonic() + 60
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", watching)
        while tries < 300 or (not opened and time.monotonic() < end):  # a busy machine meets few
            tries += 1
            with contextlib.suppress(ArtifactError):
                open_artifact(out)
    done.set()
    thread.join()
    assert set(opened) == {"inside"}


# --- no artifact ---------------------------------------------------------------------------------


def test_no_directory(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "expected a directory")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "expected a directory")
    refused(tmp_path, "is no compiled directory: it has no manifest.json; .* export CHECKPOINT")
    (tmp_path / "config.json").touch()
    refused(tmp_path, "is a checkpoint: it has config.json and no manifest.json; .* export /.* -o")
    (tmp_path / "manifest.json").symlink_to(tmp_path / "file")
    refused(tmp_path, r"manifest\.json: expected a regular file")
    (tmp_path / "manifest.json").unlink()
    os.mkfifo(tmp_path / "manifest.json")
    refused(tmp_path, r"manifest\.json: expected a regular file")


def test_manifest_of_a_stranger(out: Path) -> None:
    (out / "manifest.json").write_text('{"name": "a browser extension", "manifest_version": 3}')
    refused(out, "no schema_version")


def test_huge_manifest(out: Path) -> None:
    with (out / "manifest.json").open("ab") as file:
        file.truncate(2**24 + 1)
    refused(out, "more than 16777216 bytes")


def test_manifest_cut_at_every_byte(out: Path) -> None:
    data = (out / "manifest.json").read_bytes()
    for length in range(len(data) - 1):
        with pytest.raises(ArtifactError):
            Manifest.from_bytes(data[:length])
    Manifest.from_bytes(data)


def test_graphs_point_only_into_listed_files(tmp_path: Path) -> None:
    files = contents()
    del files["weights.bin"]
    refused(write_artifact(tmp_path / "a", files), "'weights.bin' is not the plain name of a list")
    files = contents(weights=bytes(191))
    refused(write_artifact(tmp_path / "b", files), r"vision\.onnx: tensor 'w': bytes 64 to 192")


def test_every_graph_is_scanned(tmp_path: Path) -> None:
    files = contents() | {"vision.fp16.onnx": b""}
    refused(write_artifact(tmp_path / "a", files), r"vision\.fp16\.onnx: not ONNX")
    files = contents() | {"vision.fp16.onnx": MODEL}
    open_artifact(write_artifact(tmp_path / "b", files))


@pytest.mark.parametrize("which", ["inputs", "outputs"])
def test_graph_keeps_its_promise(tmp_path: Path, which: str) -> None:
    record = manifest_of(contents()).components["vision"]
    spec = TensorSpec(name="z", dtype="float32", shape=())
    changed: dict[str, Any] = {which: (spec,)}
    components = {"vision": replace(record, **changed)}
    out = write_artifact(tmp_path / "out", contents(), components=components)
    refused(out, f"promises {which}")


# --- the manifest's text -------------------------------------------------------------------------


def test_golden_bytes() -> None:
    manifest = Manifest(
        tool_version="0.1.0",
        precision="fp32",
        model={"kind": "vision"},
        image_size=28,
        preprocessing={},
        recipe=None,
        source={"checkpoint": "小"},
        components={
            "vision": ComponentRecord(
                file="vision.onnx",
                inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 4)),),
                outputs=(),
                nbytes=128,
                verification=None,
            )
        },
        engines=(
            EngineRecord(
                component="vision",
                target="tensorrt",
                file="engines/v.plan",
                sidecar="engines/v.json",
            ),
        ),
        files={
            "w.safetensors": FileRecord(nbytes=9, sha256=None, header_sha256="a" * 64),
            "vision.onnx": FileRecord(nbytes=0, sha256="0" * 64),
            "engines/v.plan": FileRecord(nbytes=3, sha256="a" * 64),
            "engines/v.json": FileRecord(nbytes=2, sha256="a" * 64),
        },
    )
    assert manifest.to_bytes() == GOLDEN.encode()
    assert Manifest.from_bytes(GOLDEN.encode()) == manifest


def test_not_a_number_is_not_written() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        manifest_of(contents(), source={"x": float("nan")}).to_bytes()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)  # fmt: skip
OBJECT = st.dictionaries(st.text(max_size=5), JSON, max_size=3)
SHARDS = st.sampled_from(["model.safetensors", "model-00001-of-00002.safetensors"])
NAME = st.text("abcXYZ019._- é", min_size=1, max_size=12).filter(lambda n: n not in {".", ".."})
HASH = st.text("0123456789abcdef", min_size=64, max_size=64)
FILE = st.builds(FileRecord, nbytes=st.integers(0, 2**50), sha256=HASH)
SHARD = st.builds(
    FileRecord, nbytes=st.integers(0, 2**50), sha256=st.none() | HASH, header_sha256=HASH
)
SPEC = st.builds(
    TensorSpec,
    name=st.text(max_size=8),
    dtype=st.sampled_from(["float32", "bfloat16", "int64", "bool", "int4", "float8_e4m3fn"]),
    shape=st.lists(st.integers(0, 2**40) | st.text(max_size=5), max_size=5).map(tuple),
)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    top = draw(st.dictionaries(NAME, FILE, min_size=1, max_size=5))
    folder = draw(st.dictionaries(NAME.map(lambda name: f"engines/{name}"), FILE, max_size=4))
    record = st.builds(
        ComponentRecord,
        file=st.sampled_from(sorted(top)),
        inputs=st.lists(SPEC, max_size=2).map(tuple),
        outputs=st.lists(SPEC, max_size=2).map(tuple),
        nbytes=st.integers(0, 2**50),
        verification=st.none() | OBJECT,
    )
    names = st.sampled_from(["vision", "matcher", "decoder"])
    components = draw(st.dictionaries(names, record, min_size=1, max_size=3))
    engine = st.builds(
        EngineRecord,
        component=st.sampled_from(sorted(components)),
        target=st.text(max_size=5),
        file=st.sampled_from(sorted(folder or top)),
        sidecar=st.sampled_from(sorted(folder or top)),
    )
    return Manifest(
        tool_version=draw(st.text(max_size=5)),
        precision=draw(st.text(max_size=5)),
        model=draw(OBJECT),
        image_size=draw(st.integers(1, 2**20)),
        preprocessing=draw(OBJECT),
        recipe=draw(st.none() | OBJECT),
        source=draw(OBJECT),
        components=components,
        engines=tuple(draw(st.lists(engine, max_size=3))),
        files=top | folder | draw(st.dictionaries(SHARDS, SHARD, max_size=2)),
    )


@pytest.mark.slow
@given(manifests())
def test_round_trip(manifest: Manifest) -> None:
    data = manifest.to_bytes()
    assert Manifest.from_bytes(data) == manifest
    assert Manifest.from_bytes(data).to_bytes() == data
    assert Manifest.from_json(json.loads(data)) == Manifest.from_json(manifest.to_json())
    assert data.isascii()


@pytest.mark.slow
@given(st.binary(max_size=60) | OBJECT.map(lambda o: json.dumps(o).encode()))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ArtifactError):
        Manifest.from_bytes(data)


VALUES = [None, True, 0, -1, 1.5, "", "x", [], [1], {}, {"x": 1}]


@given(st.data())
def test_any_value_anywhere_is_taken_or_refused(data: st.DataObject) -> None:
    """One value of a sound manifest replaced: refused, or a manifest that says just that."""
    raw = json.loads(manifest_of(contents(engine=b"plan")).to_bytes())
    place: Any = raw
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = data.draw(st.sampled_from(keys))
        if not place[key] or not isinstance(place[key], dict | list) or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(st.sampled_from(VALUES))
    try:
        manifest = Manifest.from_json(raw)
    except ArtifactError:
        return
    assert manifest.to_json() == raw


def edited(change: Callable[[dict[str, Any]], object]) -> bytes:
    raw = json.loads(manifest_of(contents(engine=b"plan")).to_bytes())
    change(raw)
    return json.dumps(raw).encode()


def _file(name: str) -> Callable[[dict[str, Any]], object]:
    record = {"nbytes": 1, "sha256": "0" * 64, "header_sha256": None}
    return lambda raw: raw["files"].update({name: record})


def _hashes(name: str, whole: Any, header: Any) -> Callable[[dict[str, Any]], object]:
    record = {"nbytes": 1, "sha256": whole, "header_sha256": header}
    return lambda raw: raw["files"].update({name: record})


VISION = ("components", "vision")
RULES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "newer": (lambda r: r.update(schema_version=2), "version 2 is newer.*upgrade internvl-edge"),
    "newer with other keys": (lambda r: r.update(schema_version=9, x=1), "upgrade internvl-edge"),
    "version 0": (lambda r: r.update(schema_version=0), "no schema_version"),
    "version true": (lambda r: r.update(schema_version=True), "no schema_version"),
    "unknown key": (lambda r: r.update(extra=1), r"manifest: unknown keys \['extra'\]"),
    "missing key": (lambda r: r.pop("model"), r"missing keys \['model'\]"),
    "text as number": (lambda r: r.update(image_size="28"), "image_size: expected int, found str"),
    "float as number": (lambda r: r.update(image_size=28.0), "expected int, found float"),
    "true as number": (lambda r: r.update(image_size=True), "expected int, found bool"),
    "no image": (lambda r: r.update(image_size=0), "positive image_size"),
    "recipe": (lambda r: r.update(recipe=[]), "recipe: expected dict or null, found list"),
    "no components": (lambda r: r.update(components={}, engines=[]), "at least one component"),
    "component": (lambda r: r["components"].update(vision=1), "expected an object, found int"),
    "component key": (lambda r: r["components"]["vision"].update(x=1), "unknown keys"),
    "component name": (lambda r: r["components"].update({"a/b": r["components"]["vision"]}), "a/b"),
    "component size": (lambda r: r["components"]["vision"].update(nbytes=-1), "from 0, found -1"),
    "component file": (lambda r: r["components"]["vision"].update(file="x"), "'x' is not listed"),
    "component in folder": (lambda r: r["components"]["vision"].update(file=ENGINE), "not listed"),
    "spec": (lambda r: r["components"]["vision"]["inputs"].append(3), r"inputs\[1\]: expected an"),
    "dtype": (lambda r: r["components"]["vision"]["inputs"][0].update(dtype="f4"), "dtype 'f4'"),
    "dimension": (lambda r: r["components"]["vision"]["inputs"][0].update(shape=[-1]), "found -1"),
    "dimension type": (lambda r: r["components"]["vision"]["inputs"][0].update(shape=[None]), "No"),
    "engine": (lambda r: r["engines"].append({}), r"engines\[1\]: unknown keys \[\], missing"),
    "engine file": (lambda r: r["files"].pop(ENGINE), "is not listed"),
    "engine sidecar": (lambda r: r["files"].pop(SIDECAR), "is not listed"),
    "engine component": (lambda r: r["engines"][0].update(component="x"), "of 'x'"),
    "file record": (lambda r: r["files"].update(a=None), r"files\['a'\]: expected an object"),
    "file size": (lambda r: r["files"]["README.md"].update(nbytes=-1), "from 0, found -1"),
    "hash": (lambda r: r["files"]["README.md"].update(sha256="A" * 64), "hexadecimal"),
    "hash length": (lambda r: r["files"]["README.md"].update(sha256="a" * 63), "hexadecimal"),
    "hash of nothing": (_hashes("w.safetensors", None, None), "expected a sha256, or a header_sha"),
    "header's hash": (_hashes("w.safetensors", None, "a" * 63), "header_sha256 must be 64"),
    "header of a graph": (
        _hashes("vision.onnx", None, "a" * 64),
        r"only \*\.safetensors files may",
    ),
    "header of an engine": (_hashes(ENGINE, "a" * 64, "a" * 64), r"only \*\.safetensors files may"),
    "header in a folder": (_hashes("engines/w.safetensors", None, "a" * 64), "only"),
    "header's hash as a number": (_hashes("w.safetensors", None, 1), "expected str or null"),
    "manifest itself": (_file("manifest.json"), "not a plain file name"),
    "no name": (_file(""), "not a plain file name"),
    "no name in folder": (_file("engines/"), "not a plain file name"),
    "dot": (_file("."), "not a plain file name"),
    "parent": (_file(".."), "not a plain file name"),
    "parent of folder": (_file("engines/.."), "not a plain file name"),
    "escape": (_file("../secret"), "files lie in the directory"),
    "escape from folder": (_file("engines/../../secret"), "files lie in the directory"),
    "absolute": (_file("/etc/passwd"), "files lie in the directory"),
    "root": (_file("/passwd"), "files lie in the directory"),
    "other folder": (_file("sub/w.bin"), "files lie in the directory"),
    "deeper": (_file("engines/a/b"), "files lie in the directory"),
    "backslash": (_file("..\\secret"), "not a plain file name"),
    "NUL": (_file("w.bin\0x"), "not a plain file name"),
    "newline": (_file("a\nb"), "not a plain file name"),
    "escape code": (_file("a\x1b[2J"), "not a plain file name"),
    "surrogate": (_file("a\ud800"), "half a character"),
}


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule: str) -> None:
    change, message = RULES[rule]
    Manifest.from_bytes(edited(lambda raw: None))
    with pytest.raises(ArtifactError, match=message):
        Manifest.from_bytes(edited(change))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON"),
        (b"\xff{}", "not JSON in UTF-8"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b"{} {}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"schema_version": ' + b"1" * 5000 + b"}", "not JSON"),
        (b"[1]", "no schema_version"),
        (b'{"schema_version": NaN}', "NaN is not JSON"),
        (b'{"schema_version": 1, "schema_version": 1}', r"stand twice: 'schema_version'"),
        (b'{"schema_version": 1, "files": {"a": 1, "a": 2}}', r"stand twice: 'a'"),
    ],
)
def test_text_that_is_no_manifest(data: bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        Manifest.from_bytes(data)


def test_errors_name_the_manifest(out: Path) -> None:
    (out / "manifest.json").write_bytes(b"{")
    refused(out, rf"^{out}/manifest\.json: not JSON")


def test_file_names_that_are_plain() -> None:
    names = ("model-00001-of-00002.safetensors", ".hidden", "a b.bin", "größe.txt", "reports/x")
    for name in names:
        Manifest.from_bytes(edited(_file(name)))


SHARD_HEADER = b'{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}'
SHARD_BYTES = struct.pack("<Q", len(SHARD_HEADER)) + SHARD_HEADER + bytes(9)


def with_shard(out: Path, *, whole: str | None) -> Path:
    """A directory with a linked shard, of which the whole hash may be known."""
    record = FileRecord(
        nbytes=len(SHARD_BYTES),
        sha256=whole,
        header_sha256=hashlib.sha256(SHARD_HEADER).hexdigest(),
    )
    files = contents() | {"w.safetensors": SHARD_BYTES}
    listed = manifest_of(files).files | {"w.safetensors": record}
    return write_artifact(out, files, files=listed)


@pytest.mark.parametrize("whole", [None, hashlib.sha256(SHARD_BYTES).hexdigest()])
def test_linked_shards_are_known_by_their_header(tmp_path: Path, whole: str | None) -> None:
    out = with_shard(tmp_path / "out", whole=whole)
    shard = out / "w.safetensors"
    open_artifact(out)
    open_artifact(out, whole=True)
    for offset in range(8, 8 + len(SHARD_HEADER)):
        changed = bytearray(SHARD_BYTES)
        changed[offset] ^= 1
        shard.write_bytes(changed)
        refused(out, r"w\.safetensors: .* says header_sha256 .*the file was changed")
        open_artifact(out, hash_files=False)
    shard.write_bytes(SHARD_BYTES + b"\0")
    refused(out, "it has", hash_files=False)
    _flip_to(shard, SHARD_BYTES)
    open_artifact(out)  # the data is not read
    if whole is None:
        open_artifact(out, whole=True)
    else:
        refused(out, r"w\.safetensors: .* says sha256 .*the file was changed", whole=True)


def _flip_to(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    _flip(path)


@pytest.mark.parametrize("length", [0, 2**40, 2**64 - 1])
def test_a_header_that_says_a_wrong_length(tmp_path: Path, length: int) -> None:
    out = with_shard(tmp_path / "out", whole=None)
    (out / "w.safetensors").write_bytes(struct.pack("<Q", length) + SHARD_BYTES[8:])
    refused(out, "says header_sha256")


def test_hard_links_of_a_manifest() -> None:
    weights = {"a": "hard link", "b": "reflink", "c": "copy", "d": "hard link"}
    assert manifest_of(contents(), source={"weights": weights}).hard_links == ("a", "d")
    for source in ({}, {"weights": None}, {"weights": ["hard link"]}):
        assert manifest_of(contents(), source=source).hard_links == ()


def test_hash_is_of_the_whole_file(tmp_path: Path) -> None:
    """More than one chunk, two files at once."""
    data = os.urandom(3 << 20)
    files = contents() | {"a.bin": data, "b.bin": data[::-1]}
    out = write_artifact(tmp_path / "out", files)
    assert open_artifact(out).manifest.files["a.bin"] == file_record(data)
    for name, offset in itertools.product(("a.bin", "b.bin"), (0, 1 << 20, len(data) - 1)):
        changed = bytearray(files[name])
        changed[offset] ^= 0x80
        (out / name).write_bytes(changed)
        refused(out, f"{name}.*the file was changed")
        (out / name).write_bytes(files[name])
    open_artifact(out)


def test_running_out_of_descriptors_is_not_the_directorys_fault(tmp_path: Path) -> None:
    """In a child, whose limit it is: it said "export again"."""
    out = write_artifact(tmp_path / "out", contents())
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(most := os.open(os.devnull, os.O_RDONLY))  # all below it are taken
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
            with pytest.raises(ResourceError, match=r"Too many open files.*ulimit -n"):
                open_artifact(out)
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
