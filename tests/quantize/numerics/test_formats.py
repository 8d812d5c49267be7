"""INT8 and FP8: equal, to the bit, to ONNX Runtime's and ONNX's own reference operators."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx.reference import ReferenceEvaluator

from internvl_edge.errors import CalibrationError, CheckpointError, UsageError, VerificationError
from internvl_edge.quantize.numerics.formats import (
    FORMATS,
    FP8,
    INT8,
    MIN_SCALE,
    Format,
    as_format,
    dequantize,
    fake_quantize,
    grid,
    quantize,
    require_finite,
    scale_of,
    sqnr_db,
    weight_scale,
)
from internvl_edge.types import Array

BOTH = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
SCALES = st.floats(MIN_SCALE, 2.0**100, width=32)


def qdq_model(fmt: Format, axis: int | None) -> bytes:
    """x, scale → QuantizeLinear → q (as bytes' own type) → DequantizeLinear → y."""
    code = getattr(onnx.TensorProto, fmt.onnx_type)
    shape = [None] if axis is not None else []
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    nodes = [
        onnx.helper.make_node(
            "QuantizeLinear", ["x", "s"], ["q"], output_dtype=code, saturate=1, **attributes
        ),
        onnx.helper.make_node("DequantizeLinear", ["q", "s"], ["y"], **attributes),
    ]
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "qdq",
        [info("x", onnx.TensorProto.FLOAT, [None, None]), info("s", onnx.TensorProto.FLOAT, shape)],
        [info("q", code, [None, None]), info("y", onnx.TensorProto.FLOAT, [None, None])],
    )
    opset = [onnx.helper.make_opsetid("", 23)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


@cache
def ort_session(name: str, axis: int | None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(
        qdq_model(FORMATS[name], axis), options, providers=["CPUExecutionProvider"]
    )


@cache
def onnx_reference(name: str, axis: int | None) -> ReferenceEvaluator:
    return ReferenceEvaluator(onnx.load_from_string(qdq_model(FORMATS[name], axis)))


def assert_same_bits(actual: Array, expected: Array) -> None:
    assert actual.shape == expected.shape
    np.testing.assert_array_equal(actual.view(np.uint8), expected.view(np.uint8))


def run_ort(fmt: Format, axis: int | None, x: Array, scale: Array) -> tuple[Array, Array]:
    binding = ort_session(fmt.name, axis)
    values = binding.run_with_ort_values(
        ["q", "y"],
        {name: onnxruntime.OrtValue.ortvalue_from_numpy(v) for name, v in (("x", x), ("s", scale))},
    )
    q = values[0].numpy().view(np.uint8).reshape(x.shape)
    return q, values[1].numpy()


@st.composite
def tensors(draw: st.DrawFn) -> Array:
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 7)))
    return draw(arrays(np.float32, shape, elements=FLOATS))


@BOTH
@given(x=tensors(), scale=SCALES)
@settings(max_examples=150, deadline=None)
def test_per_tensor_equals_onnxruntime(fmt: Format, x: Array, scale: float) -> None:
    s = np.float32(scale)
    q, y = run_ort(fmt, None, x, np.asarray(s))
    assert_same_bits(quantize(x, s, fmt).view(np.uint8), q)
    np.testing.assert_array_equal(dequantize(quantize(x, s, fmt), s), y)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("axis", [0, 1])
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_per_channel_equals_onnxruntime(fmt: Format, axis: int, data: st.DataObject) -> None:
    x = data.draw(tensors())
    s = data.draw(arrays(np.float32, x.shape[axis], elements=SCALES))
    q, y = run_ort(fmt, axis, x, s)
    assert_same_bits(quantize(x, s, fmt, axis).view(np.uint8), q)
    assert_same_bits(quantize(x, s, fmt, axis - 2).view(np.uint8), q)
    np.testing.assert_array_equal(dequantize(quantize(x, s, fmt, axis), s, axis), y)


@BOTH
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_equals_the_onnx_reference(fmt: Format, axis: int | None) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((37, 53)).astype(np.float32) * 50
    s = np.asarray(rng.uniform(0.01, 1.0, () if axis is None else x.shape[axis]), np.float32)
    q, y = onnx_reference(fmt.name, axis).run(None, {"x": x, "s": s})
    assert_same_bits(quantize(x, s, fmt, axis), np.asarray(q))
    np.testing.assert_array_equal(fake_quantize(x, s, fmt, axis), y)


def test_every_byte_of_fp8_is_its_own_quantization() -> None:
    stored = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    finite = stored[np.isfinite(stored.astype(np.float32))]
    assert finite.size == 254  # two NaN, no infinities
    assert_same_bits(quantize(finite.astype(np.float32), 1.0, FP8), finite)


@pytest.mark.parametrize(
    ("fmt", "x", "expected"),
    [
        (INT8, [0.5, 1.5, 2.5, -0.5, -1.5], [0, 2, 2, 0, -2]),
        (
            INT8,
            [126.5, 127.4, 127.5, 1e30, -127.5, -128.5, -1e30],
            [126, 127, 127, 127, *[-128] * 3],
        ),
        # E4M3 between 16 and 32 has a step of 2; below 2⁻⁶ one of 2⁻⁹.
        (FP8, [17.0, 19.0, 2**-10, 3 * 2**-10], [16, 20, 0, 2**-8]),
        (FP8, [448.0, 464.0, 465.0, 1e30, -1e30], [448, 448, 448, 448, -448]),
    ],
)
def test_ties_go_to_even_and_ends_saturate(
    fmt: Format, x: list[float], expected: list[float]
) -> None:
    q = quantize(np.array(x, np.float32), 1.0, fmt)
    np.testing.assert_array_equal(q.astype(np.float32), np.array(expected, np.float32))


@BOTH
@given(x=tensors(), scale=SCALES)
@settings(deadline=None)
def test_error_is_half_a_step_within_the_range(fmt: Format, x: Array, scale: float) -> None:
    s = float(np.float32(scale))
    inside = np.abs(x.astype(np.float64)) <= fmt.max_value * s
    y = fake_quantize(x, s, fmt).astype(np.float64)
    assert np.isfinite(y).all()
    levels = np.concatenate((-grid(fmt)[:0:-1], grid(fmt))) * s
    nearest = np.abs(x.astype(np.float64)[..., None] - levels).min(axis=-1)
    # The float32 quotient may cross a tie that the exact one does not: one rounding of slack.
    slack = np.abs(x.astype(np.float64)) * 2.0**-22 + 1e-44
    assert (np.abs(x - y)[inside] <= (nearest + slack)[inside]).all()


@BOTH
@given(x=tensors(), axis=st.sampled_from([None, 0, 1, -1]))
@settings(deadline=None)
def test_quantizing_twice_changes_nothing_and_scales_are_normal(
    fmt: Format, x: Array, axis: int | None
) -> None:
    scale = weight_scale(x, fmt, axis)
    assert scale.dtype == np.float32
    assert scale.shape == (() if axis is None else (x.shape[axis],))
    assert (scale >= np.finfo(np.float32).tiny).all()
    assert (np.float32(1.0) / scale >= np.finfo(np.float32).tiny).all()
    assert np.isfinite(np.float32(1.0) / scale).all()
    q = quantize(x, scale, fmt, axis)
    assert_same_bits(quantize(dequantize(q, scale, axis), scale, fmt, axis), q)


def in_bfloat16(x: float) -> float:
    """The nearest number of 8 significant bits."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(mantissa * 256) / 256, exponent)


@BOTH
def test_weight_scale_by_its_definition(fmt: Format) -> None:
    w = np.random.default_rng(2).standard_normal((3, 4, 5)).astype(np.float32)
    expected = [in_bfloat16(np.abs(w[:, i]).max() / fmt.max_value) for i in range(4)]
    np.testing.assert_array_equal(weight_scale(w, fmt, 1), np.array(expected, np.float32))
    whole = in_bfloat16(np.abs(w).max() / fmt.max_value)
    np.testing.assert_array_equal(weight_scale(w, fmt, None), np.float32(whole))
    stored = quantize(w, weight_scale(w, fmt, 1), fmt, 1).astype(np.float32)
    np.testing.assert_array_equal(np.abs(stored).max(axis=(0, 2)), np.full(4, fmt.max_value))


@BOTH
def test_zero_denormal_and_huge_channels(fmt: Format) -> None:
    w = np.zeros((4, 3), np.float32)
    w[1] = 1e-40  # denormal
    w[2] = np.finfo(np.float32).max
    w[3] = [1e-30, -5e-31, 0.0]
    y = fake_quantize(w, weight_scale(w, fmt, 0), fmt, 0)
    assert (y[0] == 0.0).all()
    assert np.abs(y[1]).max() <= 2 * 1e-40
    np.testing.assert_allclose(y[2:], w[2:], rtol=0.07)


@BOTH
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_float_types_are_computed_in_float32(fmt: Format, dtype: Any) -> None:
    x = np.random.default_rng(3).standard_normal((4, 5)).astype(dtype)
    scale = weight_scale(x, fmt, 0)
    wide = x.astype(np.float32)
    np.testing.assert_array_equal(scale, weight_scale(wide, fmt, 0))
    assert_same_bits(quantize(x, scale, fmt, 0), quantize(wide, scale, fmt, 0))


def test_strided_arrays_give_what_their_copies_give() -> None:
    x = np.random.default_rng(4).standard_normal((8, 6)).astype(np.float32)[::2, ::-1].T
    scale = weight_scale(x, INT8, 0)
    assert_same_bits(quantize(x, scale, INT8, 0), quantize(np.ascontiguousarray(x), scale, INT8, 0))


@BOTH
def test_grid_and_names(fmt: Format) -> None:
    values = grid(fmt)
    assert values[0] == 0.0
    assert values[-1] == fmt.max_value
    assert (np.diff(values) > 0).all()
    assert as_format(fmt.name) is fmt is as_format(fmt)
    assert (
        onnx.helper.tensor_dtype_to_np_dtype(getattr(onnx.TensorProto, fmt.onnx_type)) == fmt.dtype
    )


@BOTH
@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_a_large_array_is_quantized_like_its_elements(fmt: Format, axis: int | None) -> None:
    x = np.random.default_rng(6).standard_normal((700, 3, 250)).astype(np.float32)
    scale = weight_scale(x, fmt, axis)
    shape = [1, 1, 1]
    if axis is not None:
        shape[axis] = -1
    quotients = np.clip(x / scale.reshape(shape), fmt.lowest, fmt.max_value)
    expected = (np.rint(quotients) if fmt is INT8 else quotients).astype(fmt.dtype)
    assert_same_bits(quantize(x, scale, fmt, axis), expected)
    for shape_of_none in ((), (0,), (3, 0), (0, 3)):
        assert quantize(np.ones(shape_of_none, np.float32), 1.0, fmt).shape == shape_of_none


def test_an_empty_weight_has_no_range() -> None:
    assert weight_scale(np.zeros((2, 0), np.float32), INT8, 0).tolist() == [MIN_SCALE] * 2
    assert float(weight_scale(np.zeros((0,), np.float32), INT8, None)) == MIN_SCALE


def test_unknown_format_is_refused() -> None:
    with pytest.raises(UsageError, match=r"found 'int2'"):
        as_format("int2")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_require_finite_names_tensor_and_place(bad: float) -> None:
    x = np.zeros((3, 4), np.float32)
    require_finite(x, "fine")
    x[1, 2] = x[2, 0] = bad
    with pytest.raises(CalibrationError, match=r"blocks\.3: .*found 2 .* of 12, .*\(1, 2\)"):
        require_finite(x, "blocks.3")
    with pytest.raises(CheckpointError, match="weight"):
        require_finite(x, "weight", CheckpointError)


def test_sqnr() -> None:
    r = np.array([3.0, 4.0], np.float32)
    assert sqnr_db(r, r + np.array([0.3, 0.4], np.float32)) == pytest.approx(20.0, abs=1e-5)
    assert sqnr_db(r, r) == math.inf
    assert sqnr_db(np.zeros(2), r) == -math.inf
    big = np.full((1 << 21) + 3, 2.0, np.float32)  # more than one chunk
    assert sqnr_db(big, big * 1.5) == pytest.approx(20 * math.log10(2))
    with pytest.raises(VerificationError, match=r"\(2,\), found \(3,\)"):
        sqnr_db(r, np.zeros(3))


def test_scale_of_keeps_reciprocals_normal() -> None:
    scales = scale_of(np.array([0.0, 1e-44, 127.0, 3e38], np.float32), INT8)
    assert scales[0] == scales[1] == np.float32(MIN_SCALE)
    assert scales[2] == 1.0
    assert np.isfinite(scales).all()
