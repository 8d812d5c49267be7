"""Forecasts, compared with what an export then writes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import TINY, write_internvl, write_vit

from internvl_edge.compiler import ExportOptions, export, forecast
from internvl_edge.compiler.cost import Cost, Forecast
from internvl_edge.compiler.steps import verify
from internvl_edge.compiler.steps.calibration import cost as calibration_cost
from internvl_edge.errors import ResourceError, UsageError
from internvl_edge.files.spool import Budget, Spool
from internvl_edge.quantize.recipe import recipe_for

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stored", "precision", "weights"),
    [
        ("fp32", "fp32", "auto"),  # copied
        ("fp32", "fp16", "auto"),
        ("fp16", "fp16", "auto"),  # what lies on the residual stream becomes float32
        ("fp16", "fp16", "copy"),
        ("bf16", "bf16", "link"),
        ("bf16", "bf16", "copy"),
        ("bf16", "fp32", "link"),
    ],
)
@pytest.mark.parametrize("components", [("vision",), ("vision", "decoder")])
def test_what_is_written_was_foretold(
    tmp_path: Path, stored: str, precision: str, weights: str, components: tuple[str, ...]
) -> None:
    checkpoint = write_internvl(tmp_path / "checkpoint", dtype=DTYPES[stored], shards=3).path
    options = ExportOptions(
        checkpoint=checkpoint,
        out=tmp_path / "out",
        precision=precision,
        components=components,
        weights=weights,
        verify="none",
    )
    (step,) = (step for step in forecast(options).steps if step.name == "weights")
    written = sum(
        path.stat().st_size
        for path in export(options).path.glob("*.safetensors")
        if path.stat().st_nlink == 1
    )
    headers = 30_000  # of files, which a forecast does not count
    assert written - headers <= step.disk_nbytes <= written


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "fp8", "int8-wo"])
def test_quantized_weights_are_counted(tmp_path: Path, precision: str) -> None:
    checkpoint = write_internvl(tmp_path / "checkpoint").path
    options = ExportOptions(
        checkpoint=checkpoint, out=tmp_path / "out", precision=precision, verify="none"
    )
    (step,) = (step for step in forecast(options).steps if step.name == "weights")
    size = (export(options).path / "weights.safetensors").stat().st_size
    assert size - 60_000 <= step.disk_nbytes <= size


def test_products_of_inputs_are_counted(tmp_path: Path) -> None:
    """Four activations of a block are held as K × K, queries, keys and values sharing one.

    Of the largest layer, what is rounded and its errors are there twice.
    """
    checkpoint = write_vit(tmp_path / "checkpoint").path
    plain = recipe_for("int8")
    options = ExportOptions(
        checkpoint=checkpoint, out=tmp_path / "out", precision="int8", recipe=plain
    )
    rounded = replace(options, recipe=replace(plain, rounding="gptq"))
    before, after = (
        next(step for step in forecast(found).steps if step.name == "quantize")
        for found in (options, rounded)
    )
    vision = TINY.vision
    width, inner = vision.hidden_size, vision.intermediate_size
    held = 3 * width**2 + inner**2 + 2 * max(3 * width, inner) * width
    assert after.memory_nbytes - before.memory_nbytes == 4 * held
    assert after.disk_nbytes == before.disk_nbytes


def test_an_engine_a_component(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the tensorrt-rtx package is not installed")
    checkpoint = write_internvl(tmp_path / "checkpoint").path
    options = ExportOptions(
        checkpoint=checkpoint, out=tmp_path / "out", precision="fp16", targets=("tensorrt-rtx",)
    )
    found = {step.name: step for step in forecast(options).steps}
    assert found["build image_pool"].seconds < found["build vision"].seconds
    assert found["build vision"].memory_nbytes > found["build vision"].needed_nbytes


@pytest.mark.slow
@pytest.mark.parametrize("components", [("vision",), ("image_queries", "text_embed", "matcher")])
def test_spools_of_every_stream_are_counted(
    tmp_path: Path, components: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write_internvl(tmp_path / "checkpoint").path
    options = ExportOptions(
        checkpoint=checkpoint,
        out=tmp_path / "out",
        precision="int8",
        components=components,
        verify="none",
    )
    monkeypatch.setattr(calibration_cost, "spool_budget", lambda _: Budget(0))  # all of it on disk
    (step,) = (step for step in forecast(options).steps if step.name == "quantize")
    spools: list[Spool] = []
    most = 0
    append = Spool.append

    def watch(self: Spool, values: Any) -> None:
        nonlocal most
        append(self, values)
        spools.append(self)
        alive = {id(s): s for s in spools if not s.is_closed}.values()
        most = max(most, sum(4 * math.prod(shape) for s in alive for shape in s.shapes))

    monkeypatch.setattr(Spool, "append", watch)
    export(options)
    assert most <= step.disk_nbytes < 1.5 * most


def test_a_cache_of_fixed_capacity_is_counted_where_it_is_compared(tmp_path: Path) -> None:
    """Keys and values of two texts, as given, read and written; a position more costs as much."""
    checkpoint = write_internvl(tmp_path / "checkpoint").path
    options = ExportOptions(checkpoint=checkpoint, out=tmp_path / "out", components=("decoder",))
    needs = {}
    for capacity in (None, 64, 65):
        chosen = replace(options, cache_capacity=capacity)
        (step,) = (step for step in forecast(chosen).steps if step.name == "verify")
        needs[capacity] = step.memory_nbytes
    llama = TINY.qllama
    position = 2 * llama.num_key_value_heads * llama.head_dim * llama.num_hidden_layers
    assert needs[65] - needs[64] == 4 * 3 * 2 * position
    assert needs[64] - needs[None] == 64 * (needs[65] - needs[64])


def verification(options: ExportOptions) -> Cost:
    (step,) = (step for step in forecast(options).steps if step.name == "verify")
    return step


def test_memory_that_verification_lacks_has_a_way_out(tmp_path: Path) -> None:
    checkpoint = write_internvl(tmp_path / "checkpoint").path
    options = ExportOptions(checkpoint=checkpoint, out=tmp_path / "out", verify="full")
    short = Forecast(steps=(verification(options),))
    said = "by --memory-budget; --verify auto compares one block at a time where there is less, "
    with pytest.raises(ResourceError, match=f"{said}--verify none leaves the comparison out"):
        short.require_fit(tmp_path, 1000)


@pytest.mark.parametrize("is_budget", [True, False])
@pytest.mark.parametrize("capacity", [None, 32])
def test_what_does_not_fit_whole_is_compared_by_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capacity: int | None, is_budget: bool
) -> None:
    """A budget may be short, or the machine; who asks for the whole gets it all the same."""
    checkpoint = write_internvl(tmp_path / "checkpoint").path
    options = ExportOptions(checkpoint=checkpoint, out=tmp_path / "out", cache_capacity=capacity)
    whole = verification(options)
    short = whole.memory_nbytes - 1
    if is_budget:
        options = replace(options, memory_budget=short)
    else:
        monkeypatch.setattr(verify, "total_memory", lambda: 2 * short)
    assert verification(options).memory_nbytes < whole.memory_nbytes
    with pytest.raises(UsageError, match="more than half of the machine's memory, or the budget"):
        verification(replace(options, min_sqnr=20.0))
    assert verification(replace(options, verify="full")).memory_nbytes == whole.memory_nbytes
