"""Operations and bytes of graphs, compared with counts made by hand and by another way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image
from support.checkpoints import write_internvl
from support.tiny_onnx import FLOAT, INT64, linear, write_onnx

from internvl_edge.artifact.open import open_artifact
from internvl_edge.benchmark.inputs import seeded_feeds
from internvl_edge.benchmark.limits.roofline import component_workload
from internvl_edge.benchmark.limits.workload import Workload, read_workload
from internvl_edge.compiler import ExportOptions, export
from internvl_edge.errors import ArtifactError
from internvl_edge.types import Array

F32 = 4  # bytes


def work(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    shapes: dict[str, tuple[int, ...]],
    constants: dict[str, Array] | None = None,
    inputs: dict[str, int] | None = None,
) -> Workload:
    """Of a graph whose dimensions are all symbolic."""
    given = [
        (name, (inputs or {}).get(name, FLOAT), [f"{name}{axis}" for axis in range(len(shape))])
        for name, shape in shapes.items()
    ]
    file = write_onnx(path / "a.onnx", nodes, given, [("y", FLOAT, ["?"])], constants)
    return read_workload(file, shapes)


def test_a_linear_layer(tmp_path: Path) -> None:
    found = read_workload(linear(tmp_path / "a.onnx"), {"x": (5, 4)})
    assert found.operations == {"float32": 2 * 5 * 4 * 3}
    assert found.weight_nbytes == 4 * 3 * F32 + 8  # and the axis of the sum
    assert found.io_nbytes == (5 * 4 + 5 * 3 + 5) * F32
    assert found.intensity == pytest.approx(120 / (56 + 160))


def test_products_of_many_dimensions(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["a", "b"], ["y"])
    found = work(tmp_path, [node], {"a": (2, 3, 5, 7), "b": (3, 7, 11)})
    assert found.operations == {"float32": 2 * (2 * 3 * 5 * 11) * 7}


@pytest.mark.parametrize("trans_a", [0, 1])
def test_gemm(tmp_path: Path, trans_a: int) -> None:
    node = helper.make_node("Gemm", ["a", "b"], ["y"], transA=trans_a)
    shape = (7, 5) if trans_a else (5, 7)
    found = work(tmp_path, [node], {"a": shape, "b": (7, 3)})
    assert found.operations == {"float32": 2 * 5 * 7 * 3}


def test_conv(tmp_path: Path) -> None:
    """4 × 4 outputs of 6 channels, each over 2 channels (of 4, in two groups) and 3 × 3 pixels."""
    node = helper.make_node("Conv", ["x", "w"], ["y"], group=2, kernel_shape=[3, 3])
    weight = np.zeros((6, 2, 3, 3), np.float32)
    found = work(tmp_path, [node], {"x": (2, 4, 6, 6)}, {"w": weight})
    assert found.operations == {"float32": 2 * (2 * 6 * 4 * 4) * (2 * 3 * 3)}


def test_attention(tmp_path: Path) -> None:
    """2 images, 4 heads: 5 queries see 7 keys of 8 channels; both products."""
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], q_num_heads=4, kv_num_heads=4)
    found = work(tmp_path, [node], {"q": (2, 5, 32), "k": (2, 7, 32), "v": (2, 7, 32)})
    assert found.operations == {"float32": 2 * (2 * 4 * 5 * 7) * 8 + 2 * (2 * 4 * 5 * 8) * 7}


def test_attention_of_four_dimensions(tmp_path: Path) -> None:
    """Keys of 8 channels, values of 6."""
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"])
    found = work(tmp_path, [node], {"q": (2, 4, 5, 8), "k": (2, 4, 7, 8), "v": (2, 4, 7, 6)})
    assert found.operations == {"float32": 2 * 2 * 4 * 5 * 7 * (8 + 6)}


def test_attention_sees_its_cache(tmp_path: Path) -> None:
    node = helper.make_node("Attention", ["q", "k", "v", "", "pk", "pv"], ["y", "a", "b"])
    new = dict.fromkeys(("k", "v"), (2, 4, 1, 8))
    past = dict.fromkeys(("pk", "pv"), (2, 4, 9, 8))
    found = work(tmp_path, [node], {"q": (2, 4, 1, 8)} | new | past)
    assert found.operations == {"float32": 2 * 2 * 4 * 1 * (9 + 1) * (8 + 8)}


def test_a_weight_counts_once_and_unread_ones_do_not(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("MatMul", ["h", "w"], ["y"]),
    ]
    weights = {"w": np.zeros((4, 4), np.float32), "unread": np.zeros(1000, np.float32)}
    found = work(tmp_path, nodes, {"x": (3, 4)}, weights)
    assert found.weight_nbytes == 16 * F32
    assert found.operations == {"float32": 2 * 2 * 3 * 4 * 4}


def test_of_a_table_only_the_rows_that_are_read(tmp_path: Path) -> None:
    node = helper.make_node("Gather", ["table", "ids"], ["y"])
    table = {"table": np.zeros((1000, 8), np.float32)}
    found = work(tmp_path, [node], {"ids": (2, 3)}, table, inputs={"ids": INT64})
    assert found.weight_nbytes == 2 * 3 * 8 * F32
    assert found.operations == {}


@pytest.mark.parametrize(
    ("dtype", "kind"), [(TensorProto.INT8, "int8"), (TensorProto.FLOAT8E4M3FN, "float8")]
)
def test_quantized_products_are_counted_apart(tmp_path: Path, dtype: int, kind: str) -> None:
    """Both factors come out of 8 bits; where one does, the product is of floats."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale"], ["q"], output_dtype=dtype),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "scale"], ["wd"]),
        helper.make_node("MatMul", ["d", "wd"], ["h"]),
        helper.make_node("MatMul", ["h", "wd"], ["y"]),
    ]
    scale = {"scale": np.array(0.1, np.float32), "w": np.zeros((4, 4), np.float32)}
    file = write_onnx(
        tmp_path / "a.onnx", nodes, [("x", FLOAT, ["n", 4])], [("y", FLOAT, ["n", 4])], scale
    )
    model = onnx.load(file)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "w")
    weight.CopyFrom(helper.make_tensor("w", dtype, [4, 4], bytes(16), raw=True))
    onnx.save(model, file)
    found = read_workload(file, {"x": (3, 4)})
    assert found.operations == {kind: 2 * 3 * 4 * 4, "float32": 2 * 3 * 4 * 4}
    assert found.weight_nbytes == 16 + F32


def test_a_batch_from_the_shape_of_an_input(tmp_path: Path) -> None:
    """Queries that are repeated for each image: inference alone loses the number of them."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], start=0, end=1),
        helper.make_node("Squeeze", ["shape"], ["batch"]),
        helper.make_node("Reshape", ["batch", "minus"], ["list"]),
        helper.make_node("Concat", ["list", "rest"], ["full"], axis=0),
        helper.make_node("Expand", ["queries", "full"], ["many"]),
        helper.make_node("MatMul", ["many", "x"], ["y"]),
    ]
    constants = {
        "minus": np.array([-1]),
        "rest": np.array([1, 1]),
        "queries": np.zeros((1, 6, 4), np.float32),
    }
    found = work(tmp_path, nodes, {"x": (5, 4, 3)}, constants)
    assert found.operations == {"float32": 2 * 5 * 6 * 4 * 3}


def test_what_depends_on_values_is_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["places"]),
        helper.make_node("Cast", ["places"], ["some"], to=FLOAT),
        helper.make_node("MatMul", ["w", "some"], ["y"]),
    ]
    with pytest.raises(ArtifactError, match=r"a\.onnx.*does not follow from the inputs"):
        work(tmp_path, nodes, {"x": (5,)}, {"w": np.zeros((2, 1), np.float32)})


# --- exported graphs -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("work")
    checkpoint = write_internvl(root / "checkpoint")
    photographs = root / "photographs"
    photographs.mkdir()
    for i in range(4):
        noise = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(photographs / f"{i}.png")
    for precision in ("fp32", "int8"):
        export(
            ExportOptions(
                checkpoint=checkpoint.path,
                out=root / precision,
                precision=precision,
                verify="none",
                calibration=photographs if precision == "int8" else None,
                components=("vision", "image_queries", "image_pool"),
            )
        )
    return {name: open_artifact(root / name) for name in ("fp32", "int8")}


def test_the_vision_tower_by_its_formula(compiled: dict[str, Any]) -> None:
    """Patches, and per block qkv, both products of attention, proj, fc1 and fc2."""
    artifact = compiled["fp32"]
    vision = artifact.manifest.model["internvl"]["vision"]
    width, mlp = vision["hidden_size"], vision["intermediate_size"]
    patch, batch = vision["patch_size"], 3
    patches = (artifact.manifest.image_size // patch) ** 2
    n = patches + 1
    block = 2 * n * (4 * width**2 + 2 * width * mlp) + 4 * n * n * width
    total = vision["num_hidden_layers"] * block + 2 * patches * width * 3 * patch**2
    feeds = seeded_feeds(artifact, "vision", batch)
    found = component_workload(artifact, "vision", feeds, "onnxruntime")
    assert found.operations == {"float32": batch * total}


def test_every_component_has_work(compiled: dict[str, Any]) -> None:
    for precision, artifact in compiled.items():
        for component in artifact.manifest.components:
            one, two = (
                component_workload(
                    artifact, component, seeded_feeds(artifact, component, batch), "onnxruntime"
                )
                for batch in (1, 2)
            )
            assert sum(two.operations.values()) == 2 * sum(one.operations.values())
            assert two.io_nbytes == 2 * one.io_nbytes
            assert ("int8" in one.operations) == (precision == "int8" and component != "image_pool")


def test_engines_have_a_graph_of_their_own(compiled: dict[str, Any]) -> None:
    feeds = seeded_feeds(compiled["int8"], "vision", 1)
    here, engine = (
        component_workload(compiled["int8"], "vision", feeds, backend)
        for backend in ("onnxruntime", "tensorrt-rtx")
    )
    assert here.operations["int8"] == engine.operations["int8"]
    assert "float16" not in here.operations
    assert here.operations["float32"] == sum(
        count for kind, count in engine.operations.items() if kind.startswith("float")
    )
    assert engine.operations["float16"] > engine.operations.get("float32", 0)
