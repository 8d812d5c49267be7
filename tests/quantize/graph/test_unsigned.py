"""INT8 products with unsigned weights: exact on every CPU, and chosen where signed ones are not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from support.artifacts import MODEL, contents, write_artifact

from internvl_edge.artifact.components import COMPONENTS, unsigned_graph
from internvl_edge.artifact.open import open_artifact
from internvl_edge.quantize.graph.unsigned import take_unsigned_weights
from internvl_edge.runtime.ort import choice, cpu
from internvl_edge.runtime.ort import session as sessions
from internvl_edge.runtime.ort.options import OrtOptions
from internvl_edge.runtime.ort.session import OrtSession, open_component
from internvl_edge.types import Array

SCALE = np.float32(1 / 64)  # of activations
K, N = 64, 24


def weights() -> tuple[Array, Array]:
    """Pairs of neighbours at both ends of the range, which 16 bits cannot add up."""
    values = np.random.default_rng(0).integers(-128, 128, (K, N)).astype(np.int8)
    values[:16, ::2], values[16:32, 1::2] = 127, -128
    return values, np.random.default_rng(1).uniform(0.001, 0.01, N).astype(np.float32)


def graph(values: Array, scales: Array, *, has_pair: bool = True) -> ir.Model:
    constants = [
        numpy_helper.from_array(array, name)
        for name, array in (("w", values), ("s", scales), ("a", SCALE), ("z", np.int8(0)))
    ]
    nodes = [helper.make_node("DequantizeLinear", ["w", "s"], ["wd"], axis=1)]
    if has_pair:
        nodes.append(helper.make_node("QuantizeLinear", ["x", "a", "z"], ["q"]))
        nodes.append(helper.make_node("DequantizeLinear", ["q", "a", "z"], ["xd"]))
    nodes.append(helper.make_node("MatMul", ["xd" if has_pair else "x", "wd"], ["y"]))
    floats = {"x": [None, K], "y": [None, N]}
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in floats.items())
    wd = helper.make_tensor_value_info("wd", TensorProto.FLOAT, [K, N])
    made = helper.make_graph(nodes, "g", [x], [y], constants, value_info=[wd])
    opset = [helper.make_opsetid("", 23)]
    return ir.from_proto(helper.make_model(made, opset_imports=opset, ir_version=11))


def run(model: ir.Model, x: Array) -> Array:
    with OrtSession("m.onnx", graph=ir.to_proto(model).SerializeToString()) as session:
        return session.run({"x": x})["y"]


def by_hand(x: Array, values: Array, scales: Array) -> Array:
    rounded = np.clip(np.rint(x / SCALE), -128, 127).astype(np.int64)
    return np.asarray((rounded @ values.astype(np.int64)) * (SCALE * scales.astype(np.float64)))


def test_large_neighbours_are_added_up_exactly() -> None:
    values, scales = weights()
    x = np.random.default_rng(2).uniform(-2, 2, (5, K)).astype(np.float32)
    model = graph(values, scales)
    assert take_unsigned_weights(model) == 1
    np.testing.assert_allclose(run(model, x), by_hand(x, values, scales), rtol=1e-5, atol=1e-5)


def test_signed_weights_need_vnni() -> None:
    """What the other form is for: where it is not needed, signed weights are exact too."""
    values, scales = weights()
    x = np.random.default_rng(2).uniform(0, 2, (5, K)).astype(np.float32)
    error = np.abs(run(graph(values, scales), x) - by_hand(x, values, scales)).max()
    if not cpu.products_saturate():
        assert error < 1e-4


def test_the_same_values_by_the_specification() -> None:
    values, scales = weights()
    x = np.random.default_rng(3).uniform(-2, 2, (2, K)).astype(np.float32)
    model = graph(values, scales)
    take_unsigned_weights(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    (found,) = ReferenceEvaluator(proto).run(None, {"x": x})
    np.testing.assert_allclose(found, by_hand(x, values, scales), rtol=1e-4, atol=1e-4)


def test_weights_alone_stay_signed() -> None:
    assert take_unsigned_weights(graph(*weights(), has_pair=False)) == 0


def test_it_is_done_once() -> None:
    model = graph(*weights())
    assert [take_unsigned_weights(model) for _ in range(2)] == [1, 0]


@pytest.mark.parametrize(
    ("machine", "flags", "saturates"),
    [
        ("x86_64", "sse2 avx2", True),
        ("AMD64", "", True),
        ("x86_64", "avx2 avx512f avx512_vnni", False),
        ("x86_64", "avx2 avx_vnni", False),
        ("aarch64", "asimddp", False),
    ],
)
def test_what_a_cpu_says(
    monkeypatch: pytest.MonkeyPatch, machine: str, flags: str, saturates: bool
) -> None:
    monkeypatch.setattr(cpu.platform, "machine", lambda: machine)
    monkeypatch.setattr(cpu, "cpuinfo", lambda field: flags)
    assert cpu.products_saturate() is saturates


@pytest.mark.parametrize(("saturates", "has_graph"), [(True, True), (True, False), (False, True)])
def test_a_cpu_opens_the_graph_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saturates: bool, has_graph: bool
) -> None:
    out = tmp_path / "out"
    write_artifact(out, contents() | ({unsigned_graph("vision"): MODEL} if has_graph else {}))
    monkeypatch.setattr(choice, "products_saturate", lambda: saturates)
    opened: list[str] = []
    monkeypatch.setattr(sessions, "OrtSession", lambda path, **_: opened.append(path.name))
    open_component(open_artifact(out), "vision", device="cpu")
    (name,) = opened
    assert name == (unsigned_graph("vision") if saturates and has_graph else "vision.onnx")


@pytest.mark.parametrize(
    ("is_large", "fold", "found"),
    [(True, None, False), (False, None, None), (True, True, True), (False, False, False)],
)
def test_weights_of_a_large_component_are_not_copied(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_large: bool,
    fold: bool | None,
    found: bool | None,
) -> None:
    out = tmp_path / "out"
    write_artifact(out, contents() | {unsigned_graph("vision"): MODEL})
    artifact = open_artifact(out)
    nbytes = artifact.manifest.components["vision"].nbytes
    monkeypatch.setattr(choice, "MAX_FOLDED_NBYTES", nbytes - 1 if is_large else nbytes)
    monkeypatch.setattr(choice, "products_saturate", lambda: True)
    opened: list[OrtOptions] = []
    monkeypatch.setattr(sessions, "OrtSession", lambda _, options, **__: opened.append(options))
    open_component(artifact, "vision", device="cpu", options=OrtOptions(fold=fold))
    assert [options.fold for options in opened] == [found]
    if found is False:
        monkeypatch.setitem(COMPONENTS, "vision", replace(COMPONENTS["vision"], takes_cache=True))
        open_component(artifact, "vision", device="cpu", options=OrtOptions(fold=fold))
        assert opened[1].fold is fold, "a decoder reads its weights for every token"


def test_unfolded_it_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values, scales = weights()
    model = graph(values, scales)
    take_unsigned_weights(model)
    ir.save(model, tmp_path / "m.onnx")
    x = np.random.default_rng(4).uniform(-2, 2, (5, K)).astype(np.float32)
    switched_off: list[list[str]] = []
    create = sessions.onnxruntime.InferenceSession

    def watched(*args: Any, **kwargs: Any) -> Any:
        switched_off.append(kwargs["disabled_optimizers"])
        return create(*args, **kwargs)

    monkeypatch.setattr(sessions.onnxruntime, "InferenceSession", watched)
    for fold in (True, False):
        with OrtSession(tmp_path / "m.onnx", options=OrtOptions(fold=fold)) as session:
            assert ("ConstantFolding" in switched_off[-1]) is not fold
            np.testing.assert_allclose(
                session.run({"x": x})["y"], by_hand(x, values, scales), rtol=1e-5, atol=1e-5
            )
