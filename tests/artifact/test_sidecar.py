"""An engine's sidecar: its round trip, what it refuses, and which machines it fits."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_edge.artifact.census import Census
from internvl_edge.artifact.manifest import TensorSpec
from internvl_edge.artifact.sidecar import (
    MAX_SIDECAR_NBYTES,
    EngineInfo,
    ShapeRanges,
    check_engine,
    read_engine_info,
)
from internvl_edge.errors import ArtifactError, HardwareError, UsageError
from internvl_edge.runtime.trt.profiles import EngineSpec
from internvl_edge.runtime.trt.profiles import Profile as Bounds

RTX = SimpleNamespace(__name__="tensorrt_rtx", __version__="1.7.1.116")
INFO = EngineInfo(
    component="vision",
    target="tensorrt-rtx",
    precision="int8",
    builder_version="1.7.1.116",
    tool_version="0.1.0",
    compute_capabilities=(),
    minimum_sm=80,
    profile=ShapeRanges(),
    onnx_sha256="ab" * 32,
    nbytes=12,
    sha256="cd" * 32,
    fused_attention=4,
    decomposed_attention=1,
    build_seconds=1.5,
    inputs=(TensorSpec(name="pixel_values", dtype="float32", shape=("batch", 3, 56, 56)),),
    outputs=(TensorSpec(name="image_embeds", dtype="float32", shape=("batch", 24)),),
    census=Census(
        precision="int8",
        layers={"gemm": 4, "kgen": 9},
        fused_attention=4,
        expected_attention=4,
        expected_8_bit=4,
        products={"Int8 · Int8 → BFloat16": 4},
        wide_products=(),
        num_wide_products=0,
    ),
)
CENSUS = INFO.to_json()["census"]

names = st.text(min_size=1, max_size=12)
counts = st.integers(0, 1 << 50)
specs = st.builds(
    TensorSpec,
    name=names,
    dtype=names,
    shape=st.lists(st.integers(1, 999) | names, max_size=4).map(tuple),
)
ranges = st.lists(st.integers(1, 5000), min_size=3, max_size=3).map(lambda n: tuple(sorted(n)))
infos = st.builds(
    EngineInfo,
    **dict.fromkeys(("component", "target", "precision", "builder_version", "tool_version"), names),
    **dict.fromkeys(("onnx_sha256", "sha256"), names),
    **dict.fromkeys(("minimum_sm", "nbytes", "fused_attention", "decomposed_attention"), counts),
    compute_capabilities=st.lists(names, max_size=3).map(tuple),
    profile=st.builds(ShapeRanges, batch=ranges, length=ranges, past=ranges),
    build_seconds=st.floats(0, 1e6),
    census=st.none()
    | st.builds(
        Census,
        precision=names,
        **dict.fromkeys(("layers", "products"), st.dictionaries(names, counts, max_size=3)),
        **dict.fromkeys(("fused_attention", "expected_attention"), counts),
        **dict.fromkeys(("expected_8_bit", "num_wide_products"), counts),
        wide_products=st.lists(names, max_size=3).map(tuple),
    ),
    **dict.fromkeys(("inputs", "outputs"), st.lists(specs, max_size=3).map(tuple)),
)


@pytest.mark.slow
@given(infos)
def test_json_gives_back_what_was_written(info: EngineInfo) -> None:
    assert EngineInfo.from_json(json.loads(json.dumps(info.to_json()))) == info


def test_total_is_past_and_length() -> None:
    profile = ShapeRanges(length=(1, 10, 20), past=(0, 96, 100))
    assert profile.range_of("total") == (1, 106, 120)
    assert profile.range_of("past") == (0, 96, 100)


def test_an_unknown_symbolic_dimension_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'frames'.*batch, length, past"):
        ShapeRanges().range_of("frames")


@pytest.mark.parametrize(
    "batch", [(0, 1, 2), (2, 1, 3), (1, 4, 2), (1, 2), (1.0, 2, 3), [1, 2, 3], None, (True, 2, 3)]
)
def test_a_profile_that_is_no_range_is_refused(batch: Any) -> None:
    with pytest.raises(UsageError, match="profile batch"):
        ShapeRanges(batch=batch)


def test_a_sidecar_of_an_earlier_version_has_no_census() -> None:
    raw = INFO.to_json()
    del raw["census"]
    assert EngineInfo.from_json(raw) == replace(INFO, census=None)


@pytest.mark.parametrize("name", sorted({f.name for f in fields(EngineInfo)} - {"census"}))
def test_a_missing_key_is_refused(name: str) -> None:
    raw = INFO.to_json()
    del raw[name]
    with pytest.raises(ArtifactError, match=name):
        EngineInfo.from_json(raw)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("schema", 2),
        ("extra", 1),
        ("component", ""),
        ("component", 3),
        ("nbytes", -1),
        ("nbytes", True),
        ("nbytes", 1.0),
        ("build_seconds", float("nan")),
        ("build_seconds", "fast"),
        ("profile", {"batch": [1, 2, 3]}),
        ("profile", {"batch": [3, 2, 1], "length": [1, 2, 3], "past": [0, 1, 2]}),
        ("profile", 7),
        ("compute_capabilities", "SM89"),
        ("inputs", [{"name": "x", "dtype": "float32"}]),
        ("inputs", [{"name": "x", "dtype": "float32", "shape": [-1]}]),
        ("inputs", {"name": "x"}),
        ("census", {"layers": {}}),
        ("census", {**CENSUS, "layers": {"gemm": -1}}),
        ("census", {**CENSUS, "products": [1]}),
        ("census", {**CENSUS, "wide_products": [1]}),
        ("census", {**CENSUS, "fused_attention": None}),
        ("census", {**CENSUS, "precision": 8}),
    ],
)
def test_a_wrong_value_is_refused(name: str, value: object) -> None:
    with pytest.raises(ArtifactError, match="engine sidecar"):
        EngineInfo.from_json({**INFO.to_json(), name: value})


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b" " * (MAX_SIDECAR_NBYTES + 1)],
)
def test_a_file_that_is_no_sidecar_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "vision.json"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"vision\.json"):
        read_engine_info(path)


def test_a_sidecar_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"none\.json"):
        read_engine_info(tmp_path / "none.json")


@pytest.mark.parametrize("sm", [None, 80, 86, 89, 120, 121])
def test_a_portable_engine_fits_this_release_and_later_gpus(sm: int | None) -> None:
    check_engine(INFO, RTX, sm=sm)


def test_another_release_is_refused_with_both_versions() -> None:
    installed = SimpleNamespace(__name__="tensorrt_rtx", __version__="1.8.0.1")
    with pytest.raises(HardwareError, match=r"another version.*1\.7\.1\.116.*1\.8\.0\.1"):
        check_engine(INFO, installed)


def test_another_target_is_refused() -> None:
    installed = SimpleNamespace(__name__="tensorrt", __version__="1.7.1.116")
    with pytest.raises(HardwareError, match=r"tensorrt-rtx 1.*installed is tensorrt 1"):
        check_engine(INFO, installed)


@pytest.mark.parametrize(
    ("minimum", "named", "sm"), [(80, (), 75), (89, (), 86), (89, ("SM89", "SM120"), 90)]
)
def test_another_gpu_is_refused(minimum: int, named: tuple[str, ...], sm: int) -> None:
    info = replace(INFO, minimum_sm=minimum, compute_capabilities=named)
    with pytest.raises(HardwareError, match=f"another GPU: built for SM{minimum}.*SM{sm}"):
        check_engine(info, RTX, sm=sm)


@pytest.mark.parametrize(
    ("sm", "runs"), [(80, True), (87, False), (90, False), (100, False), (120, True), (121, True)]
)
def test_a_portable_rtx_engine_does_not_run_between_its_gpus(sm: int, runs: bool) -> None:
    """As a first run on an H100 said: 8.0 8.6 8.9 12.0 12.1 >12.0."""
    if runs:
        check_engine(INFO, RTX, sm=sm)
        return
    with pytest.raises(
        HardwareError, match=rf"not run on this GPU, which is SM{sm}.*tensorrt here"
    ):
        check_engine(INFO, RTX, sm=sm)


def test_the_largest_call_is_that_of_all_profiles() -> None:
    """Of a decoder: one profile of prompts, one of single tokens."""
    shapes = {
        "input_ids": ("batch", "length"),
        "attention_mask": ("batch", "past+length"),
        "past_key_values.0.key": ("batch", 4, "past", 16),
    }
    inputs = {n: TensorSpec(name=n, dtype="int64", shape=shape) for n, shape in shapes.items()}
    highs = [
        {"input_ids": (2, 1), "attention_mask": (2, 65), "past_key_values.0.key": (2, 4, 64, 16)},
        {"input_ids": (8, 20), "attention_mask": (8, 40), "past_key_values.0.key": (8, 4, 20, 16)},
    ]
    profiles = tuple(Bounds(index=i, low={}, high=high) for i, high in enumerate(highs))
    spec = EngineSpec(
        inputs=inputs, outputs={}, tensors=inputs, dtypes={}, profiles=profiles, aliases={}
    )
    assert spec.largest == {"batch": 8, "length": 20, "past": 64}
