"""Pickles to safetensors: the model found wherever a trainer put it, published whole or not."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import TINY, Written, write_chat_tokenizer, write_vit

from internvl_edge.artifact.publish import placed
from internvl_edge.errors import CheckpointError, UsageError
from internvl_edge.export.checkpoint.checkpoint import open_checkpoint
from internvl_edge.export.checkpoint.oddities.table import CONTAINERS, LEFT_OUT
from internvl_edge.export.convert import pickles
from internvl_edge.export.convert.one_pickle import convert_file
from internvl_edge.export.convert.pickles import Conversion, convert_pickles

pytestmark = pytest.mark.slow

TIMM = (
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding.", "patch_embed.proj."),
    ("encoder.layers.", "blocks."),
    (".ls1", ".ls1.gamma"),
    (".ls2", ".ls2.gamma"),
)


@pytest.fixture
def source(tmp_path: Path) -> Written:
    """A folder with a configuration and no weights, and the state that is meant."""
    written = write_vit(tmp_path / "source")
    (written.path / "model.safetensors").unlink()
    return written


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pickles are read in this process, which is much faster; the names of those that were."""
    read: list[str] = []

    def converted(pickle: Path, work: Any) -> dict[str, Any]:
        read.append(pickle.name)
        target = work.path / f"{len(read)}-{os.getpid()}-{time.monotonic_ns()}.safetensors"
        notes = convert_file(pickle, target)["notes"]
        sha256 = pickles.record(target).sha256
        entry = {"file": target.name, "sha256": sha256, "notes": notes}
        work.finish(pickle.name, {"weights": [], **entry}, {})
        return entry

    monkeypatch.setattr(pickles, "_converted", converted)
    return read


def assert_same(out: Path, written: Written) -> None:
    checkpoint = open_checkpoint(out)
    assert len(checkpoint.tensors) == len(written.state)
    for name, tensor in written.state.items():
        np.testing.assert_array_equal(checkpoint.read(f"vision_model.{name}"), tensor.numpy())


def refusal(source: Path) -> str:
    out = source.parent / "out"
    with pytest.raises(CheckpointError) as caught:
        convert_pickles(source, out)
    assert not list(source.parent.glob("*out*"))
    return str(caught.value)


def timm(name: str) -> str:
    for published, own in TIMM:
        name = name.replace(published, own)
    return name


@pytest.mark.parametrize("key", [*CONTAINERS, None])
def test_the_model_under_a_key(source: Written, here: list[str], key: str | None) -> None:
    held = source.state if key is None else {"epoch": 3, key: source.state, "optimizer": {}}
    torch.save(held, source.path / "checkpoint.pth")
    out = source.path.parent / "out"
    done = convert_pickles(source.path, out)
    assert done.num_tensors == len(source.state)
    assert any("epoch" in note for note in done.notes) == (key is not None)
    assert_same(out, source)


@pytest.mark.parametrize(
    "rename",
    [
        lambda n: f"module.{n}",
        lambda n: f"_orig_mod.module.{n}",
        lambda n: f"model.{n}",
        lambda n: f"net.vision_model.{n}",
        timm,
        lambda n: f"module.{timm(n)}",
    ],
    ids=["ddp", "compile", "lightning", "net", "timm", "ddp timm"],
)
def test_names_of_others(source: Written, here: list[str], rename: Any) -> None:
    state = OrderedDict((rename(name), tensor) for name, tensor in source.state.items())
    torch.save(state, source.path / "pytorch_model.bin")
    convert_pickles(source.path, source.path.parent / "out")
    assert_same(source.path.parent / "out", source)


def test_plain_data_of_trainers_is_no_obstacle(source: Written, here: list[str]) -> None:
    held = {"model": source.state, "args": argparse.Namespace(lr=1e-3), "best": np.float64(0.5)}
    torch.save(held, source.path / "checkpoint.pth")
    convert_pickles(source.path, source.path.parent / "out")
    assert_same(source.path.parent / "out", source)


class Strange:
    """A class of a trainer."""


@pytest.mark.parametrize(
    ("held", "says"),
    [
        (torch.nn.Linear(2, 2), r"whole pickled object of class torch.nn.modules.linear.Linear"),
        ({"model": {"a": torch.ones(2)}, "config": Strange()}, "Strange, which could run code"),
        ({"state": {}, "param_groups": []}, "an optimizer's state"),
        ([1, 2], "found a list"),
        ({"epoch": 3}, "expected a dictionary of tensors, found epoch"),
        ({"a": torch.ones(2).to_sparse()}, "expected a dense tensor"),
        ({"layer.lora_A.weight": torch.ones(2)}, "LoRA"),
        ({"x": torch.ones(2)}, "no tensor has a name that was expected"),
    ],
)
def test_what_is_no_model_is_named(source: Written, here: list[str], held: Any, says: str) -> None:
    torch.save(held, source.path / "pytorch_model.bin")
    assert says in refusal(source.path)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_torchscript_archive_is_named(source: Written, here: list[str]) -> None:
    module = torch.jit.script(torch.nn.ReLU())
    torch.jit.save(module, source.path / "model.pt")
    assert "a TorchScript archive" in refusal(source.path)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\nsize 5\n", "a Git LFS pointer to a file"),
        (b"<html><title>Log in</title>", "a web page (HTML) called 'Log in'"),
        (b"", "an empty file"),
        (b"GGUF" + bytes(30), "GGUF"),
        (b"PK\x03\x04" + bytes(30), "truncated"),
    ],
)
def test_files_that_are_no_pickles(
    source: Written, here: list[str], data: bytes, says: str
) -> None:
    (source.path / "pytorch_model.bin").write_bytes(data)
    assert says in refusal(source.path)


# --- which files ---------------------------------------------------------------------------------


def halves(written: Written) -> list[dict[str, torch.Tensor]]:
    names = list(written.state)
    return [{n: written.state[n] for n in names[i::2]} for i in range(2)]


def test_shards_by_their_index(source: Written, here: list[str]) -> None:
    weight_map = {}
    for i, part in enumerate(halves(source), 1):
        file = f"pytorch_model-{i:05}-of-00002.bin"
        torch.save(part, source.path / file)
        weight_map |= dict.fromkeys(part, file)
    index = source.path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    out = source.path.parent / "out"
    convert_pickles(source.path, out)
    assert_same(out, source)
    written = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(written["weight_map"]) == set(source.state)
    shutil.rmtree(out)
    (source.path / "pytorch_model-00002-of-00002.bin").unlink()
    assert "names shard pytorch_model-00002-of-00002.bin, which is missing" in refusal(source.path)
    index.unlink()
    assert "expected 2 shards, found 1; missing: 2" in refusal(source.path)


def test_two_files_of_one_stem(source: Written, here: list[str]) -> None:
    first, second = halves(source)
    torch.save(first, source.path / "weights.pth")
    torch.save(second, source.path / "weights.pt")
    convert_pickles(source.path, source.path.parent / "out")
    assert_same(source.path.parent / "out", source)


def test_a_tensor_in_two_files_is_refused(source: Written, here: list[str]) -> None:
    torch.save(source.state, source.path / "a.pth")
    torch.save(source.state, source.path / "b.pth")
    assert "is in a.pth and in b.pth; keep the file that is meant" in refusal(source.path)


@pytest.mark.parametrize("pattern", [m for row in LEFT_OUT for m in row.markers])
def test_a_trainers_files_are_left_out(source: Written, here: list[str], pattern: str) -> None:
    torch.save(source.state, source.path / "weights.pth")
    name = pattern.replace("*", "").strip(".") + ".pt"
    name = (
        name if pattern.endswith("*") else pattern.replace("*", "x") + "pt" * pattern.endswith(".")
    )
    if not name.endswith((".pt", ".bin", ".pth")):
        name += ".pt"
    (source.path / name).write_bytes(b"not read")
    done = convert_pickles(source.path, source.path.parent / "out")
    assert any(note.startswith(f"{name} is left out") for note in done.notes), (name, done.notes)
    assert here == ["weights.pth"]


def test_a_head_is_left_out(source: Written, here: list[str]) -> None:
    torch.save({"module": source.state}, source.path / "vit.pth")
    torch.save({"module": {"head.weight": torch.ones(3, 2)}}, source.path / "vit_head.pth")
    done = convert_pickles(source.path, source.path.parent / "out")
    assert (
        "vit_head.pth is left out: none of its 1 tensor(s), such as head.weight" in done.notes[-1]
    )
    assert_same(source.path.parent / "out", source)


@pytest.mark.parametrize("index", [None, {}, "whole"])
def test_a_folder_in_place_of_a_file(source: Written, here: list[str], index: Any) -> None:
    folder = source.path / "pytorch_model.bin"
    folder.mkdir()
    torch.save(source.state, folder / "pytorch_model-00001-of-00001.bin")
    if index is not None:
        names = dict.fromkeys(source.state, "pytorch_model-00001-of-00001.bin")
        raw = {"weight_map": names} if index == "whole" else index
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(raw))
    done = convert_pickles(source.path, source.path.parent / "out")
    assert "pytorch_model.bin is a folder" in done.notes[0]
    assert_same(source.path.parent / "out", source)


def test_no_configuration_is_said_before_any_work(source: Written, here: list[str]) -> None:
    torch.save(source.state, source.path / "vit.pth")
    (source.path / "config.json").unlink()
    assert "found no config.json, which says what the weights are of" in refusal(source.path)
    assert not here


def test_safetensors_need_no_conversion(source: Written) -> None:
    save_file(source.state, source.path / "model.safetensors")
    assert "holds safetensors already" in refusal(source.path)


def test_side_files_come_along(source: Written, here: list[str]) -> None:
    torch.save(source.state, source.path / "pytorch_model.bin")
    write_chat_tokenizer(source.path)
    (source.path / "trainer_state.json").write_text("{}")
    out = source.path.parent / "out"
    convert_pickles(source.path, out)
    assert {p.name for p in out.iterdir()} == {
        "config.json",
        "tokenizer.model",
        "added_tokens.json",
        "model.safetensors",
    }


def test_an_out_that_is_there_is_left_alone(source: Written, here: list[str]) -> None:
    torch.save(source.state, source.path / "pytorch_model.bin")
    out = source.path.parent / "out"
    out.mkdir()
    with pytest.raises(UsageError, match="exists"):
        convert_pickles(source.path, out)
    assert not list(out.iterdir())


# --- whole or not at all -------------------------------------------------------------------------


def test_finished_files_are_taken_up(
    source: Written, here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for i, part in enumerate(halves(source), 1):
        torch.save(part, source.path / f"pytorch_model-{i:05}-of-00002.bin")
    out = source.path.parent / "out"

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pickles, "_place", fail)
        with pytest.raises(KeyboardInterrupt):
            convert_pickles(source.path, out)
    assert len(here) == 2
    assert not out.exists()
    work = source.path.parent / ".out.work"
    damaged = sorted(work.glob("*.safetensors"))[-1]
    data = damaged.read_bytes()
    damaged.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    convert_pickles(source.path, out)
    assert len(here) == 3  # the damaged one again
    assert_same(out, source)
    assert not list(out.parent.glob(".out*"))


def test_another_source_is_converted_anew(
    source: Written, here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(source.state, source.path / "pytorch_model.bin")
    out = source.path.parent / "out"

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pickles, "_copy_side_files", fail)
        with pytest.raises(KeyboardInterrupt):
            convert_pickles(source.path, out)
    changed = {name: tensor + 1 for name, tensor in source.state.items()}
    torch.save(changed, source.path / "pytorch_model.bin")
    convert_pickles(source.path, out)
    assert_same(out, Written(path=out, state=changed))


def test_the_process_that_reads_pickles_loads_no_code_of_others(
    source: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither from the current folder nor from where PYTHONPATH leads."""
    (tmp_path / "of-others").mkdir()
    (tmp_path / "of-others" / "json.py").write_text("raise SystemExit('loaded')")
    monkeypatch.chdir(tmp_path / "of-others")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "of-others"))
    torch.save(source.state, source.path / "pytorch_model.bin")
    convert_pickles(source.path, tmp_path / "out")
    assert_same(tmp_path / "out", source)


def test_a_kill_leaves_nothing_that_stands_in_the_way(source: Written) -> None:
    """At any moment OUT is absent or whole, and the next run goes on, whatever its process id."""
    torch.save(source.state, source.path / "pytorch_model.bin")
    out = source.path.parent / "out"
    code = (
        "import sys; from pathlib import Path; "
        "from internvl_edge.export.convert.pickles import convert_pickles; "
        "print('begun', flush=True); convert_pickles(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    for delay in (0.05, 0.5, 1.5):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(source.path), str(out)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if out.exists():
            break
    if not out.exists():
        convert_pickles(source.path, out)
    assert_same(out, source)
    assert placed(out).exists()


def test_nothing_is_published_before_it_is_synced(
    source: Written, here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(source.state, source.path / "pytorch_model.bin")
    out, synced = source.path.parent / "out", []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), out.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    done = convert_pickles(source.path, out)
    assert isinstance(done, Conversion)
    before = [path for path, is_there in synced if not is_there]
    assert any(path.endswith("/model.safetensors") for path in before)
    assert any(path.endswith("/config.json") for path in before)
    assert any(path == str(out.parent) and is_there for path, is_there in synced)
    assert load_file(out / "model.safetensors").keys() == source.state.keys()
    assert TINY.vision.num_hidden_layers == 2


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_converted_files_are_for_nobody_else_to_write_to(
    source: Written, here: list[str], tmp_path: Path, mask: int
) -> None:
    torch.save(source.state, source.path / "pytorch_model.bin")
    before = os.umask(mask)
    try:
        convert_pickles(source.path, tmp_path / "out")
    finally:
        os.umask(before)
    for path in (tmp_path / "out").iterdir():
        assert path.stat().st_mode & 0o777 == 0o644 & ~mask, path
