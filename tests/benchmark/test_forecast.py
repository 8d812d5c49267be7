"""Forecasts for GPUs, held against blocks of InternViT-6B that were measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from onnx import TensorProto, helper, save
from support.checkpoints import write_vit

from internvl_edge.benchmark.limits.forecast import (
    GPUS,
    Estimate,
    Kernel,
    estimate,
    find_gpu,
    read_kernels,
)
from internvl_edge.cli import run
from internvl_edge.compiler import ExportOptions, export
from internvl_edge.errors import UsageError

WIDTH, HIDDEN, TOKENS, HEADS = 3200, 12800, 257, 25
BLOCKS = 3
# us a block: on an H200 by profiler and clock, 12 blocks, CUDA graphs, outputs on the device, at a
# batch of 1, 8 and 32; as exported with 17 kernels, and with 11. On an H100 the slope between 4 and
# 48 blocks of benchmarks/results/gpu.json.
MEASURED = [
    ("h200", False, 1, 241.9),
    ("h200", False, 8, 1079.8),
    ("h200", False, 32, 4099.0),
    ("h200", True, 1, 208.7),
    ("h200", True, 8, 952.7),
    ("h200", True, 32, 3681.1),
    ("h100", False, 1, 248.0),
]


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks as they are exported in bfloat16; weights have shapes and no data."""
    bf16, nodes, weights = TensorProto.BFLOAT16, [], []

    def node(op: str, *inputs: str, **attributes: object) -> str:
        name = f"{op}_{len(nodes)}"
        nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def weight(*shape: int) -> str:
        tensor = TensorProto(name=f"w{len(weights)}", data_type=bf16, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="absent.bin")
        weights.append(tensor)
        return str(tensor.name)

    def linear(x: str, inputs: int, outputs: int, *, bias: bool = True) -> str:
        transposed = node("Transpose", weight(outputs, inputs), perm=[1, 0])
        product = node("MatMul", x, transposed)
        return node("Add", product, weight(outputs)) if bias else product

    def integers(*values: int) -> str:
        name = f"i{len(weights)}"
        weights.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        return name

    def norm(x: str) -> str:
        return node("RMSNormalization", x, weight(WIDTH), axis=-1)

    def residual(x: str, branch: str) -> str:
        return node("Add", x, node("Mul", branch, weight(WIDTH)))

    x = "x"
    for _ in range(BLOCKS):
        qkv = linear(norm(x), WIDTH, 3 * WIDTH, bias=False)
        q, k, v = (
            node("Slice", qkv, integers(i * WIDTH), integers((i + 1) * WIDTH), integers(2))
            for i in range(3)
        )
        heads = {"q_num_heads": HEADS, "kv_num_heads": HEADS}
        attended = node("Attention", norm(q), norm(k), v, **heads)
        x = residual(x, linear(attended, WIDTH, WIDTH))
        hidden = node("Gelu", linear(norm(x), WIDTH, HIDDEN))
        x = residual(x, linear(hidden, HIDDEN, WIDTH))
    shape = ["batch", TOKENS, WIDTH]
    graph = helper.make_graph(
        nodes,
        "tower",
        [helper.make_tensor_value_info("x", bf16, shape)],
        [helper.make_tensor_value_info(x, bf16, shape)],
        weights,
    )
    path = tmp_path_factory.mktemp("tower") / "vision.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), path)
    return path


def kernels(tower: Path, batch: int, *, is_fused: bool) -> list[Kernel]:
    return read_kernels(tower, {"x": (batch, TOKENS, WIDTH)}, is_fused=is_fused)


@pytest.mark.parametrize(("is_fused", "launches"), [(False, 17), (True, 11)])
def test_launches_are_those_that_were_counted(tower: Path, is_fused: bool, launches: int) -> None:
    found = kernels(tower, 1, is_fused=is_fused)
    first = 1 if is_fused else 0  # the first norm follows no addition here, the last has no norm
    assert len(found) == BLOCKS * launches + first
    assert [k.kind for k in found].count("product") == 4 * BLOCKS
    assert [k.kind for k in found].count("attention") == BLOCKS
    operations = sum(k.operations for k in found if k.kind == "product")
    assert operations == 2 * BLOCKS * TOKENS * (12 * WIDTH * WIDTH)


@pytest.mark.parametrize(("gpu", "is_fused", "batch", "measured_us"), MEASURED)
def test_estimates_are_near_what_was_measured(
    tower: Path, gpu: str, is_fused: bool, batch: int, measured_us: float
) -> None:
    found = estimate(kernels(tower, batch, is_fused=is_fused), find_gpu(gpu))
    block_us = 1e3 * found.latency_ms / BLOCKS
    assert abs(block_us / measured_us - 1) < 0.15, block_us
    assert found.roof_ms < found.product_ms


def test_more_work_and_a_slower_gpu_take_longer(tower: Path) -> None:
    def of(name: str, batch: int) -> Estimate:
        return estimate(kernels(tower, batch, is_fused=True), GPUS[name])

    for name in GPUS:
        times = [of(name, batch).latency_ms for batch in (1, 4, 16)]
        assert times == sorted(times)
    order = ("h200", "h100", "l40s", "rtx4090", "orin")
    times = [of(name, 8).latency_ms for name in order]
    assert times == sorted(times)


def test_a_type_that_a_gpu_lacks_is_refused() -> None:
    product = Kernel(kind="product", type="float8", operations=1, nbytes=1)
    with pytest.raises(UsageError, match="orin: it does not compute in float8; choose"):
        estimate([product], GPUS["orin"])
    with pytest.raises(UsageError, match="expected one of h100, h200, l40s, rtx4090, orin"):
        find_gpu("b200")


@pytest.mark.slow
def test_a_forecast_needs_no_gpu_and_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_vit(tmp_path / "checkpoint", seed=0).path
    out = tmp_path / "out"
    export(ExportOptions(checkpoint=checkpoint, out=out, precision="fp16", verify="none"))
    assert run(["benchmark", str(out), "--forecast-gpu", "orin", "--batch", "1,4", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert answer["is_estimate"] is True
    assert [row["batch_size"] for row in answer["results"]] == [1, 4]
    for row in answer["results"]:
        parts = row["product_ms"] + row["attention_ms"] + row["other_ms"]
        assert row["latency_ms"] == pytest.approx(parts)
    assert run(["benchmark", str(out), "--forecast-gpu", "b200"]) == 2
    assert "expected one of h100" in capsys.readouterr().err
