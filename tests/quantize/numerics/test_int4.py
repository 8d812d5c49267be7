"""INT4 in blocks: against ONNX Runtime and a plain loop, and the search for factors."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from internvl_edge.quantize.numerics import int4
from internvl_edge.quantize.numerics.int4 import (
    best_factors,
    block_of,
    dequantize_blocks,
    pack,
    quantize_blocks,
    rounded,
    unpack,
)
from internvl_edge.types import Array

SEEDS = st.integers(0, 2**32 - 1)


def weights(seed: int, outputs: int = 24, inputs: int = 64) -> Array:
    rng = np.random.default_rng(seed)
    scale = rng.lognormal(0, 2, (outputs, 1))
    return (rng.standard_normal((outputs, inputs)) * scale).astype(np.float32)


@given(inputs=st.integers(1, 5000), wanted=st.sampled_from([16, 32, 64, 128, 256]))
def test_a_block_divides_the_inputs(inputs: int, wanted: int) -> None:
    block = block_of(inputs, wanted)
    assert inputs % block == 0
    fits = [size for size in (256, 128, 64, 32, 16) if size <= wanted and inputs % size == 0]
    assert block == (fits[0] if fits else inputs)


@given(seed=SEEDS, block=st.sampled_from([8, 16, 32, 64]))
def test_rounding_is_the_plain_one(seed: int, block: int) -> None:
    weight = weights(seed)
    values, scales = quantize_blocks(weight, block)
    for n, k in np.random.default_rng(seed).integers(0, (24, 64), (20, 2)):
        start = k // block * block
        peak = np.abs(weight[n, start : start + block]).max() / np.float32(7)
        scale = peak.astype(ml_dtypes.bfloat16).astype(np.float32)
        assert scales[n, k // block] == scale
        assert values[n, k] == np.clip(np.rint(weight[n, k] / scale), -8, 7)
    error = np.abs(weight - dequantize_blocks(values, scales))
    assert (error <= np.repeat(scales, block, axis=1) * 0.5001).all()


@given(seed=SEEDS)
def test_rounding_what_is_rounded_changes_nothing(seed: int) -> None:
    once = rounded(weights(seed), "int4", 16)
    np.testing.assert_allclose(rounded(once, "int4", 16), once, rtol=1e-6)


def test_zeros_stay_zeros() -> None:
    assert not rounded(np.zeros((3, 32), np.float32), "int4", 16).any()


@given(shape=st.tuples(st.integers(1, 9), st.integers(1, 9)), seed=SEEDS)
def test_packing_is_onnxs(shape: tuple[int, int], seed: int) -> None:
    values = np.random.default_rng(seed).integers(-8, 8, shape).astype(np.int8)
    packed = pack(values)
    assert packed.tobytes() == numpy_helper.from_array(values.astype(ml_dtypes.int4)).raw_data
    np.testing.assert_array_equal(unpack(packed, shape), values)


@pytest.mark.parametrize("block", [16, 32, 128])
def test_onnxruntime_reads_the_same_weights(block: int) -> None:
    weight = weights(block, 48, 128)
    values, scales = quantize_blocks(weight, block)
    packed = pack(np.ascontiguousarray(values.T))
    stored = helper.make_tensor("w", TensorProto.INT4, (128, 48), packed.tobytes(), raw=True)
    node = helper.make_node("DequantizeLinear", ["w", "s"], ["y"], axis=0, block_size=block)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, (128, 48))
    scale = numpy_helper.from_array(np.ascontiguousarray(scales.T), "s")
    graph = helper.make_graph([node], "g", [], [output], [stored, scale])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    np.testing.assert_array_equal(session.run(None, {})[0].T, dequantize_blocks(values, scales))


def output_error(rows: Array, weight: Array, factors: Array) -> float:
    rough = rounded(weight * factors, "int4", 32)
    return float((((rows / factors) @ rough.T - rows @ weight.T) ** 2).sum())


def identity(rows: Array) -> Array:
    return rows


def test_factors_spare_the_columns_that_matter() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((400, 64)).astype(np.float32)
    rows[:, ::16] *= 30
    weight = rng.standard_normal((96, 64)).astype(np.float32)
    factors = best_factors([rows[:200], rows[200:]], weight, identity, "int4", 32)
    none = np.ones(64, np.float32)
    assert output_error(rows, weight, factors) < 0.5 * output_error(rows, weight, none)
    assert (factors[::16].min() > np.delete(factors, np.s_[::16])).all()
    fresh = rng.standard_normal((400, 64)).astype(np.float32) * np.abs(rows).mean(axis=0)
    assert output_error(fresh, weight, factors) < 0.7 * output_error(fresh, weight, none)


def test_factors_never_make_the_sample_worse() -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        rows = (rng.standard_normal((200, 64)) * rng.lognormal(0, 1, 64)).astype(np.float32)
        weight = weights(seed)
        factors = best_factors([rows], weight, identity, "int4", 32)
        none = np.ones(64, np.float32)
        assert output_error(rows, weight, factors) <= output_error(rows, weight, none) * 1.0001


def test_few_rows_choose_nothing() -> None:
    rows = np.random.default_rng(0).standard_normal((9, 64)).astype(np.float32)
    assert (best_factors([rows], weights(0), identity, "int4", 32) == 1).all()


def test_dead_channels_keep_their_scale() -> None:
    rows = np.random.default_rng(0).standard_normal((200, 64)).astype(np.float32)
    rows[:, 3] = 0
    factors = int4.best_factors([rows], weights(1), identity, "int4", 32)
    assert factors[3] == 1 and np.isfinite(factors).all()
