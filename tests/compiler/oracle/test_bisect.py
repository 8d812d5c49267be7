"""Bisecting: what is broken several blocks deep is named, and what is sound is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support.checkpoints import TINY, write_internvl, write_vit

from internvl_edge.cli import run
from internvl_edge.compiler import ExportOptions, export
from internvl_edge.compiler.oracle.bisect import bisect
from internvl_edge.compiler.oracle.readings import GraphReading, worst_channel_db
from internvl_edge.errors import UsageError
from internvl_edge.export.checkpoint.shards import read_header
from internvl_edge.types import Array

pytestmark = pytest.mark.slow

LAYERS = "vision_model.encoder.layers"
DEEP = replace(
    TINY,
    vision=replace(TINY.vision, num_hidden_layers=5),
    qllama=replace(TINY.qllama, num_hidden_layers=4),
)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower of five blocks, compiled at int8 and fp32."""
    folder = tmp_path_factory.mktemp("vit")
    checkpoint = write_vit(folder / "checkpoint", DEEP.vision).path
    for precision in ("int8", "fp32"):
        options = ExportOptions(
            checkpoint=checkpoint, out=folder / precision, precision=precision, verify="none"
        )
        export(options)
    return folder


def copied(vit: Path, precision: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(vit / precision, tmp_path / precision))


def change(out: Path, name: str, edit: Callable[[Array], None]) -> None:
    """Change a stored tensor in place, and nothing else of its file."""
    for path in sorted(out.glob("*.safetensors"), reverse=True):  # weights.safetensors first
        header = read_header(path)
        entry = header.get(name) or header.get(name.removeprefix("vision_model."))
        if entry is not None:  # a bare tower's own shard has no prefix
            shape = entry.shape
            values = np.memmap(path, entry.dtype, "r+", offset=entry.offset, shape=shape)
            edit(values)
            values.flush()
            return
    raise AssertionError(name)


def double(values: Array) -> None:
    values[3] *= 2


def first_bad(readings: list[GraphReading]) -> list[str | None]:
    return [None if r.first_bad is None else r.first_bad.name for r in readings]


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_what_is_sound_has_no_bad_tensor(vit: Path, precision: str) -> None:
    readings = bisect(vit / precision, vit / "checkpoint")
    assert [r.file for r in readings] == ["vision.onnx", "vision.fp16.onnx"][: len(readings)]
    assert len(readings) == (2 if precision == "int8" else 1)
    assert first_bad(readings) == [None] * len(readings)
    for reading in readings:
        assert [block.index for block in reading.blocks] == list(range(5))
        names = [tensor.name for tensor in reading.blocks[2].tensors]
        inner = ("norm1", "attn.qkv", "attn.q_norm", "attn.k_norm", "attn.core", "attn.proj")
        inner += ("norm2", "mlp.fc1", "mlp.fc2")
        assert names == [*(f"{LAYERS}.2.{name}" for name in inner), f"{LAYERS}.2"]


def test_what_quantization_costs(vit: Path) -> None:
    """Errors add up from block to block; without rounded activations there is less of them."""
    reading = bisect(vit / "int8", vit / "checkpoint")[0]
    for block in reading.blocks:
        assert block.unrounded_db is not None
        assert block.unrounded_db > block.isolated_db > 20
        assert block.accumulated_db <= block.isolated_db + 0.5
    assert reading.blocks[-1].accumulated_db < reading.blocks[0].accumulated_db
    plain = bisect(vit / "fp32", vit / "checkpoint")[0]
    assert all(block.unrounded_db is None and block.isolated_db > 90 for block in plain.blocks)


@pytest.mark.parametrize("layer", ["0.attn.qkv", "2.mlp.fc1", "4.mlp.fc2"])
def test_one_wrong_scale_of_a_weight(vit: Path, layer: str, tmp_path: Path) -> None:
    out = copied(vit, "int8", tmp_path)
    change(out, f"{LAYERS}.{layer}.weight_scale", double)
    assert first_bad(bisect(out, vit / "checkpoint"))[0] == f"{LAYERS}.{layer}"


def test_a_wrong_scale_of_an_activation(vit: Path, tmp_path: Path) -> None:
    out = copied(vit, "int8", tmp_path)
    model = onnx.load(out / "vision.onnx", load_external_data=False)
    name = f"{LAYERS}.3.attn.proj.input.scale"
    (scale,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    doubled = numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(2), scale.name)
    scale.CopyFrom(doubled)
    data = model.SerializeToString()
    path = out / "vision.onnx"
    assert len(data) == path.stat().st_size
    path.write_bytes(data)
    assert first_bad(bisect(out, vit / "checkpoint")) == [f"{LAYERS}.3.attn.proj", None]


def test_one_weight_of_a_graph_that_is_not_quantized(vit: Path, tmp_path: Path) -> None:
    out = copied(vit, "fp32", tmp_path)

    def add(values: Array) -> None:
        values[5, 7] += 1

    change(out, f"{LAYERS}.3.attn.proj.weight", add)
    assert first_bad(bisect(out, vit / "checkpoint")) == [f"{LAYERS}.3.attn.proj"]


def test_what_comes_before_the_tower(vit: Path, tmp_path: Path) -> None:
    out = copied(vit, "fp32", tmp_path)
    change(out, "vision_model.embeddings.class_embedding", lambda values: values.fill(1))
    assert first_bad(bisect(out, vit / "checkpoint")) == ["embeddings"]


def test_the_language_tower_and_what_comes_after_it(tmp_path: Path) -> None:
    checkpoint = write_internvl(tmp_path / "checkpoint", DEEP).path
    names = "text_embed", "image_queries"
    out = tmp_path / "out"
    options = ExportOptions(
        checkpoint=checkpoint, out=out, precision="fp32", components=names, verify="none"
    )
    export(options)
    readings = bisect(out, checkpoint)
    assert {r.component for r in readings} == set(names)
    assert first_bad(readings) == [None, None]
    last = next(r for r in readings if r.component == "text_embed").blocks[-1]
    assert "text_embeds" in [tensor.name for tensor in last.tensors]
    layer = "qllama.model.layers.2.cross_attn.v_proj"  # the text does not look at images
    change(out, f"{layer}.weight", lambda values: values.fill(0))
    assert first_bad(bisect(out, checkpoint, "image_queries")) == [layer]
    assert first_bad(bisect(out, checkpoint, "text_embed")) == [None]
    change(out, "text_projection", lambda values: values.fill(0))
    assert first_bad(bisect(out, checkpoint, "text_embed")) == ["text_embeds"]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_towers_of_one_block(precision: str, tmp_path: Path) -> None:
    shallow = replace(
        TINY,
        vision=replace(TINY.vision, num_hidden_layers=1),
        qllama=replace(TINY.qllama, num_hidden_layers=1),
    )
    checkpoint = write_internvl(tmp_path / "checkpoint", shallow).path
    out = tmp_path / "out"
    export(ExportOptions(checkpoint=checkpoint, out=out, precision=precision, verify="none"))
    readings = bisect(out, checkpoint)
    assert {r.component for r in readings} >= {"vision", "image_queries", "text_embed", "decoder"}
    assert first_bad(readings) == [None] * len(readings)
    assert all(len(reading.blocks) == 1 for reading in readings)
    bare = write_vit(tmp_path / "vit", shallow.vision).path
    out = tmp_path / "bare"
    export(ExportOptions(checkpoint=bare, out=out, precision=precision, verify="none"))
    assert first_bad(bisect(out, bare)) == [None] * (1 + (precision == "int8"))


@pytest.mark.parametrize("bound", [float("nan"), float("inf"), -1.0])
def test_a_bound_that_is_none_is_refused(bound: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--min-sqnr .*: expected a number of dB from 0 up"):
        bisect(tmp_path, tmp_path, min_sqnr_db=bound)


def test_the_command(vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bisect", str(vit / "int8"), "--checkpoint", str(vit / "checkpoint")]
    assert run([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["ok"] is True
    assert found["graphs"][0]["first_bad"] is None
    assert run([*command, "--min-sqnr", "1000", "--json"]) == 6
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["graphs"][0]["first_bad"] == "embeddings"
    out = copied(vit, "int8", tmp_path)
    change(out, f"{LAYERS}.1.mlp.fc1.weight_scale", double)
    command[1] = str(out)
    assert run(command) == 6
    shown = capsys.readouterr().out
    assert f"first bad tensor: {LAYERS}.1.mlp.fc1" in shown
    assert "accumulated" in shown


def test_what_cannot_be_compared_is_refused(vit: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'vision'"):
        bisect(vit / "int8", vit / "checkpoint", "visoin")
    other = write_vit(tmp_path / "other", replace(DEEP.vision, num_hidden_layers=2), seed=1)
    with pytest.raises(UsageError, match="was not made from"):
        bisect(vit / "int8", other.path)


def test_the_worst_channel() -> None:
    rng = np.random.default_rng(0)
    expected = rng.standard_normal((2, 50, 400)).astype(np.float32)
    actual = expected.copy()
    actual[..., 7] *= 2
    assert worst_channel_db(expected, expected) == 200.0
    assert worst_channel_db(expected, actual) == pytest.approx(0.0, abs=1e-6)
    expected[..., 7] = actual[..., 7] = 0
    actual[0, 0, 7] = 1e-3  # beside a channel that is silent
    assert worst_channel_db(expected, actual) > 40
    actual[0, 0, 0] = np.nan
    assert worst_channel_db(expected, actual) == -np.inf
