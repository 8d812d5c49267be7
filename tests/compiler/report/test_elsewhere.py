"""Which graphs open without the runtime: by the files and the precision of a directory."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.reports import manifest

from internvl_edge.artifact.manifest import FileRecord, Manifest, TensorSpec
from internvl_edge.compiler.report.elsewhere import openers
from internvl_edge.compiler.report.readme import readme

NEW, OLD = "ONNX Runtime 1.24.1 or later", "ONNX Runtime 1.23.2 or later"
EVERY, TENSORRT = "any processor", "TensorRT"
CUDA = "ONNX Runtime's CUDA provider"


def directory(precision: str, components: list[str], *more: str) -> Manifest:
    """The manifest of a directory with these graphs."""
    record = FileRecord(nbytes=1, sha256="0" * 64)
    files = [*(f"{name}.onnx" for name in components), *more, "weights.safetensors"]
    base = manifest()
    any_record = next(iter(base.components.values()))
    return replace(
        base,
        precision=precision,
        components={name: replace(any_record, file=f"{name}.onnx") for name in components},
        files=dict.fromkeys(files, record),
    )


def opened(of: Manifest) -> dict[str, tuple[str, str]]:
    """File → program and place."""
    return {file: (one.program, one.place) for one in openers(of) for file in one.files}


def test_float_graphs_open_anywhere() -> None:
    found = opened(directory("fp32", ["vision", "decoder"], "vision.cuda.onnx"))
    assert found["vision.onnx"] == found["decoder.onnx"] == (OLD, EVERY)
    assert found["vision.cuda.onnx"] == (CUDA, "NVIDIA GPUs")
    assert set(found) == {"vision.onnx", "decoder.onnx", "vision.cuda.onnx"}


def test_a_decoder_with_fewer_products_opens_as_its_own_graph_does() -> None:
    found = opened(directory("int4-wo", ["decoder"], "decoder.cpu.onnx"))
    assert found == {"decoder.onnx": (OLD, EVERY), "decoder.cpu.onnx": (OLD, EVERY)}


def test_bfloat16_needs_a_gpu() -> None:
    found = opened(directory("bf16", ["image_embed", "text_embed"], "model.onnx"))
    for program, place in found.values():
        assert (program, place.split(";")[0]) == (OLD, "NVIDIA GPUs")
    assert len(found) == 3


def test_int8_has_one_graph_for_every_processor() -> None:
    graphs = ("image_embed.u8.onnx", "image_embed.fp16.onnx", "model.onnx")
    found = opened(directory("int8", ["image_embed", "image_pool"], *graphs))
    assert found["image_embed.u8.onnx"] == found["model.onnx"]
    program, place = found["image_embed.u8.onnx"]
    assert (program, place.split(";")[0]) == (NEW, EVERY)
    program, place = found["image_embed.onnx"]
    assert program == NEW
    assert place.startswith("processors with VNNI or AMX, and Arm")
    assert found["image_embed.fp16.onnx"][0] == TENSORRT
    assert found["image_pool.onnx"] == (OLD, EVERY)  # a head, which is not quantized


def test_fp8_needs_a_new_runtime_or_one_optimizer_less() -> None:
    found = opened(directory("fp8", ["image_embed", "image_pool", "text_embed"], "model.onnx"))
    assert found["image_embed.onnx"] == found["model.onnx"]
    assert found["image_embed.onnx"][0].startswith("ONNX Runtime 1.32.0 or later; from 1.24.1 on")
    assert found["image_pool.onnx"] == (OLD, EVERY)


@pytest.mark.parametrize(
    ("precision", "program"),
    [
        ("fp16", "ONNX Runtime 1.25.0 or later"),
        ("int8", "ONNX Runtime 1.25.0 or later"),
        ("fp8", "ONNX Runtime 1.32.0 or later; from 1.25.0 on"),
    ],
)
def test_a_cache_in_place_needs_a_newer_runtime(precision: str, program: str) -> None:
    of = directory(precision, ["decoder"], *["decoder.u8.onnx"] * (precision == "int8"))
    indices = TensorSpec(name="write_indices", dtype="int64", shape=("batch",))
    record = replace(of.components["decoder"], inputs=(indices,))
    found = opened(replace(of, components={"decoder": record}))
    assert {one[0].split(" with ")[0] for one in found.values()} == {program}


def test_each_tower_has_its_own_precision() -> None:
    found = opened(
        directory("vision=int8,decoder=int4-wo", ["vision", "decoder"], "vision.u8.onnx")
    )
    assert found["vision.u8.onnx"][0] == NEW
    two = ["image_embed", "text_embed"]
    mixed = directory("vision=fp8,decoder=int8", two, "text_embed.u8.onnx", "model.onnx")
    assert opened(mixed)["model.onnx"] == opened(mixed)["image_embed.onnx"]
    mixed = directory("vision=int8", two, "image_embed.u8.onnx", "model.onnx")
    assert opened(mixed)["model.onnx"] == opened(mixed)["image_embed.u8.onnx"]
    assert found["decoder.onnx"] == (OLD, EVERY)


@pytest.mark.parametrize("precision", ["fp32", "int8", "fp8", "bf16"])
def test_the_readme_lists_every_graph_once(precision: str) -> None:
    graphs = ("vision.u8.onnx",) * (precision == "int8")
    of = directory(precision, ["vision"], *graphs)
    table = readme(of).split("## Without this runtime")[1]
    for file in of.files:
        assert table.count(f"`{file}`") == file.endswith(".onnx")
    assert openers(of)[0].place.startswith(EVERY) or precision == "bf16"
