"""What was verified is what runs: directories replaced or altered after they were opened."""

from __future__ import annotations

import errno
import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.tiny_onnx import publish_linear

import internvl_edge
from internvl_edge.artifact.open import Artifact, open_artifact
from internvl_edge.artifact.pins import Watch
from internvl_edge.errors import ArtifactError, InternVLError, UsageError
from internvl_edge.runtime.ort import session as ort
from internvl_edge.runtime.ort.options import OrtOptions
from internvl_edge.runtime.ort.session import OrtSession, open_component

X = np.eye(4, dtype=np.float32)


def result(session: OrtSession) -> np.ndarray:
    return session.run({"x": X})["y"]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return publish_linear(tmp_path / "out", components=("vision", "matcher"))


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return publish_linear(tmp_path / "other", seed=1, components=("vision", "matcher"))


@pytest.fixture
def right(out: Path) -> np.ndarray:
    with open_component(open_artifact(out), "vision") as session:
        return result(session)


def replace_all(out: Path, other: Path) -> None:
    shutil.rmtree(out)
    shutil.copytree(other, out)


def exchange(out: Path, other: Path) -> None:
    out.rename(out.with_name("aside"))
    other.rename(out)


def replace_weights(out: Path, other: Path) -> None:
    shutil.copy(other / "vision.bin", out / "new")
    os.replace(out / "new", out / "vision.bin")


def replace_graph(out: Path, other: Path) -> None:
    data = (other / "vision.onnx").read_bytes() + b"\x00"
    (out / "vision.onnx").unlink()
    (out / "vision.onnx").write_bytes(data)


def write_in_place(out: Path, other: Path) -> None:
    with (out / "vision.bin").open("r+b") as file:
        file.write(b"\x3f" * 8)


def cut_off(out: Path, other: Path) -> None:
    os.truncate(out / "vision.bin", 3)


def link_away(out: Path, other: Path) -> None:
    (out / "vision.bin").unlink()
    (out / "vision.bin").symlink_to(other / "vision.bin")


def remove(out: Path, other: Path) -> None:
    shutil.rmtree(out)


CHANGES = (
    replace_all,
    exchange,
    replace_weights,
    replace_graph,
    write_in_place,
    cut_off,
    link_away,
    remove,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_component_of_a_directory_that_changed_does_not_open(
    out: Path, other: Path, change: Callable[[Path, Path], None]
) -> None:
    artifact = open_artifact(out)
    change(out, other)
    with pytest.raises(ArtifactError, match=f"{out} changed since it was opened: .*load it again"):
        open_component(artifact, "vision")


def test_the_same_content_under_another_inode_opens(out: Path, right: np.ndarray) -> None:
    artifact = open_artifact(out)
    shutil.copytree(out, out.with_name("copy"))
    shutil.rmtree(out)
    out.with_name("copy").rename(out)
    with open_component(artifact, "vision") as session:
        np.testing.assert_array_equal(result(session), right)


def test_another_name_of_the_weights_is_no_change(out: Path, right: np.ndarray) -> None:
    artifact = open_artifact(out)
    os.link(out / "vision.bin", out.parent / "second name")
    os.chmod(out / "vision.bin", 0o600)
    with open_component(artifact, "vision") as session:
        os.unlink(out.parent / "second name")
        np.testing.assert_array_equal(result(session), right)


@pytest.mark.parametrize("flip", ["out", "weights"])
def test_a_link_that_is_flipped_while_native_code_opens_runs_nothing_else(
    tmp_path: Path,
    out: Path,
    other: Path,
    right: np.ndarray,
    flip: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There and back again around the very call, as an attacker would."""
    link = tmp_path / "link"
    link.symlink_to(out)
    artifact, native = open_artifact(link), ort.onnxruntime.InferenceSession

    def opens(path: str, *args: object, **options: object) -> object:
        if flip == "out":
            link.unlink()
            link.symlink_to(other)
            session = native(path, *args, **options)
            link.unlink()
            link.symlink_to(out)
            return session
        os.rename(out / "vision.bin", out / "kept")
        shutil.copy(other / "vision.bin", out / "vision.bin")
        session = native(path, *args, **options)
        os.rename(out / "kept", out / "vision.bin")
        return session

    monkeypatch.setattr(ort.onnxruntime, "InferenceSession", opens)
    if flip == "out":
        with open_component(artifact, "vision") as session:
            np.testing.assert_array_equal(result(session), right)
        return
    with pytest.raises(ArtifactError, match=r"changed since it was opened: while vision\.onnx"):
        open_component(artifact, "vision")


def test_what_is_written_to_mapped_weights_reaches_no_answer(out: Path, other: Path) -> None:
    with open_component(open_artifact(out), "vision") as session:
        write_in_place(out, other)
        with pytest.raises(ArtifactError, match=r"changed since it was opened: vision\.bin was"):
            result(session)


def test_weights_that_were_cut_off_end_no_process(out: Path, other: Path) -> None:
    with open_component(open_artifact(out), "vision") as session:
        cut_off(out, other)
        with pytest.raises(ArtifactError, match=r"vision\.bin was written to"):
            session.run_device({"x": X})


def test_copied_weights_are_nobodys_to_write_to(out: Path, other: Path, right: np.ndarray) -> None:
    options = OrtOptions(copy=True, prepack=False)
    with open_component(open_artifact(out), "vision", options=options) as session:
        assert str(out) not in Path("/proc/self/maps").read_text()
        cut_off(out, other)
        np.testing.assert_array_equal(result(session), right)


def test_copying_needs_a_directory(tmp_path: Path, out: Path) -> None:
    with pytest.raises(UsageError, match="expected a component of a compiled directory"):
        OrtSession(out / "vision.onnx", options=OrtOptions(copy=True))


def test_a_side_file_has_the_manifests_hash(out: Path, other: Path) -> None:
    artifact = open_artifact(out)
    assert artifact.read("vision.bin", 100) == (out / "vision.bin").read_bytes()
    with pytest.raises(ArtifactError, match="at most 5 bytes"):
        artifact.read("vision.bin", 5)
    with pytest.raises(ArtifactError, match=r"lists no 'manifest\.json'"):
        artifact.read("manifest.json", 100)
    replace_weights(out, other)
    with pytest.raises(ArtifactError, match=r"changed since it was opened: vision\.bin is another"):
        artifact.read("vision.bin", 100)


def test_a_directory_whose_files_were_not_hashed_is_verified_when_it_is_used(
    out: Path, other: Path
) -> None:
    replace_weights(out, other)
    artifact = open_artifact(out, hash_files=False)
    with pytest.raises(ArtifactError, match="changed since it was opened"):
        open_component(artifact, "vision")
    open_component(artifact, "matcher").close()


def test_nothing_stays_open_after_closing(out: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with internvl_edge.load(out) as model:
            result(model.session("vision"))  # type: ignore[arg-type]
    assert len(os.listdir("/proc/self/fd")) <= len(before) + 1


def test_descriptors_that_run_out_leave_nothing_open(
    out: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    gc.collect()  # what other tests left in cycles
    before, dup, calls = len(os.listdir("/proc/self/fd")), os.dup, list[int]()

    def second_fails(descriptor: int) -> int:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(errno.EMFILE, "Too many open files")
        return dup(descriptor)

    files = {path.name: path.open("rb") for path in sorted(out.iterdir())[:2]}
    monkeypatch.setattr(os, "dup", second_fails)
    with pytest.raises(OSError, match="Too many open files"):
        Watch(out, files)
    del files
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    assert [str(one.message) for one in recwarn.list] == []


def test_an_error_while_opening_names_the_directory_and_not_this_process_way(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact: Artifact = open_artifact(out)

    def fail(path: str, *args: object, **options: object) -> object:
        raise RuntimeError(f"Load model from {path} failed")

    monkeypatch.setattr(ort.onnxruntime, "InferenceSession", fail)
    with pytest.raises(InternVLError) as caught:
        open_component(artifact, "vision")
    assert f"Load model from {out}/vision.onnx failed" in str(caught.value)
