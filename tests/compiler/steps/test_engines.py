"""TensorRT-RTX engines of every component at every precision, for shapes nobody tuned for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.checkpoints import (
    TINY,
    write_chat,
    write_chat_tokenizer,
    write_internvl,
    write_tokenizer,
)

from internvl_edge import compiler
from internvl_edge.artifact.open import open_artifact
from internvl_edge.artifact.sidecar import EngineInfo, ShapeRanges, read_engine_info
from internvl_edge.compiler import ExportOptions
from internvl_edge.compiler.steps.engines import require_buildable
from internvl_edge.compiler.steps.profiles import profile_for, profile_from
from internvl_edge.errors import ResourceError, UsageError
from internvl_edge.export.engine import build, memory
from internvl_edge.export.engine.unaliased import unaliased_graph

pytest.importorskip("tensorrt_rtx", reason="the tensorrt-rtx package is not installed")

pytestmark = [pytest.mark.rtx, pytest.mark.slow]

OTHER = replace(
    TINY,
    vision=replace(TINY.vision, hidden_size=96, num_attention_heads=3, intermediate_size=160),
    qllama=replace(TINY.qllama, hidden_size=64, num_attention_heads=2, num_hidden_layers=2),
    num_query_token=7,
    cross_attention_frequency=1,
    attn_pool_num_heads=2,
)


def require_narrow(info: EngineInfo, precision: str) -> None:
    """The builder kept to the types of the graph: what was quantized is multiplied in 8 bits."""
    assert info.census is not None
    assert info.census.regressions() == []
    types = set(info.census.products)
    if precision in ("int8", "fp8") and info.component not in ("image_pool",):
        eight = {"int8": "Int8 · Int8", "fp8": "FP8 · FP8"}[precision]
        assert f"{eight} → BFloat16" in types
    if precision != "fp32":  # a head may end in a cast to the type of the component's output
        assert types <= {
            *("Int8 · Int8 → BFloat16", "FP8 · FP8 → BFloat16", "BFloat16 · BFloat16 → BFloat16"),
            *("Half · Half → Half", "Half · Half → Float", "BFloat16 · BFloat16 → Float"),
            *("Half · Int4 → Half", "Half · Int8 → Half"),
        }


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "fp8"])
def test_every_component_builds(tmp_path: Path, precision: str) -> None:
    written = write_internvl(tmp_path / "checkpoint", OTHER, seed=4)
    write_tokenizer(written.path)
    options = ExportOptions(
        checkpoint=written.path,
        out=tmp_path / "out",
        precision=precision,
        targets=("onnx", "tensorrt-rtx"),
        expect_fused=True,
    )
    artifact = compiler.export(options)
    built = {engine.component: engine for engine in artifact.manifest.engines}
    assert built.keys() == artifact.manifest.components.keys()
    for engine in built.values():
        info = read_engine_info(artifact.file(engine.sidecar))
        plan = artifact.file(engine.file)
        assert info.precision == precision
        assert info.nbytes == plan.stat().st_size
        assert artifact.manifest.files[engine.file].sha256 == info.sha256
        require_narrow(info, precision)
    report = (artifact.path / "report.html").read_text(encoding="utf-8")
    assert report.count("layers: ") == len(built)
    again = compiler.build(artifact.path, ["tensorrt-rtx"], expect_fused=True)
    assert {e.file for e in again} == {e.file for e in built.values()}, "engines are reused"


def built_decoder(tmp_path: Path, precision: str, capacity: int | None = None) -> EngineInfo:
    """What is said of the engine of a decoder alone."""
    written = write_internvl(tmp_path / "checkpoint", OTHER, seed=4)
    write_tokenizer(written.path)
    options = ExportOptions(
        checkpoint=written.path,
        out=tmp_path / "out",
        precision=precision,
        components=("decoder",),
        cache_capacity=capacity,
        targets=("onnx", "tensorrt-rtx"),
        expect_fused=True,
    )
    artifact = compiler.export(options)
    (engine,) = artifact.manifest.engines
    assert engine.component == "decoder"
    info = read_engine_info(artifact.file(engine.sidecar))
    assert info.precision == precision
    require_narrow(info, precision)
    return info


@pytest.mark.parametrize("precision", ["int8-wo", "int4-wo"])
def test_decoders_of_lighter_weights_build(tmp_path: Path, precision: str) -> None:
    assert built_decoder(tmp_path, precision).component == "decoder"


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "fp8", "int4-wo"])
def test_decoders_with_their_cache_in_place_build(tmp_path: Path, precision: str) -> None:
    info = built_decoder(tmp_path, precision, capacity=40)
    (cache, *_) = (spec for spec in info.inputs if spec.name.startswith("past_key_values."))
    assert cache.shape == ("batch", 2, 40, 32)
    assert (info.profile.batch, info.profile.length) == ((1, 1, 4), (1, 32, 40))


def test_a_cache_in_place_builds_where_it_is_written_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX then wants attention that may be decomposed, and fuses it all the same."""

    def last(fused: set[str], others: set[str], _: object) -> list[object]:
        return [(fused | others, unaliased_graph)]

    monkeypatch.setattr(build, "_attempts", last)
    info = built_decoder(tmp_path, "fp16", capacity=40)
    assert (info.fused_attention, info.decomposed_attention) == (0, 2)
    assert info.census is not None
    assert info.census.fused_attention == 2 * 2  # of either profile


@pytest.mark.parametrize("precision", ["bf16", "int4-wo", "vision=int8,chat_decoder=int4-wo"])
def test_chat_builds(tmp_path: Path, precision: str) -> None:
    written = write_chat(tmp_path / "checkpoint", seed=6)
    write_chat_tokenizer(written.path)
    options = ExportOptions(
        checkpoint=written.path,
        out=tmp_path / "out",
        precision=precision,
        targets=("onnx", "tensorrt-rtx"),
        expect_fused=True,
    )
    engines = compiler.export(options).manifest.engines
    assert {engine.component for engine in engines} == {"chat_vision", "chat_decoder"}
    sidecar = next(e.sidecar for e in engines if e.component == "chat_decoder")
    profile = read_engine_info(tmp_path / "out" / sidecar).profile
    assert profile.batch == (1, 1, 1)
    assert profile.length == (1, 320, 512)
    assert profile.past == (0, 511, 511)


def test_ranges_that_were_not_asked_for_are_the_models(tmp_path: Path) -> None:
    written = write_chat(tmp_path / "checkpoint")
    options = ExportOptions(checkpoint=written.path, out=tmp_path / "out", verify="none")
    manifest = compiler.export(options).manifest
    found = profile_for(manifest, "chat_decoder", {"batch": (1, 2, 3)})
    assert found == ShapeRanges(batch=(1, 2, 3), length=(1, 320, 512), past=(0, 511, 511))
    asked = profile_for(manifest, "chat_decoder", {"length": (1, 2, 300)})
    assert asked.length == (1, 2, 300)
    with pytest.raises(UsageError, match="positions for 512 tokens, asked for up to 513"):
        profile_for(manifest, "chat_decoder", {"length": (1, 2, 513)})
    with pytest.raises(UsageError, match="512 positions, asked for up to 512 before 1 or more"):
        profile_for(manifest, "chat_decoder", {"past": (0, 96, 512)})
    with pytest.raises(UsageError, match="512 positions, asked for up to 504 before 9 or more"):
        profile_for(manifest, "chat_decoder", {"past": (0, 96, 504), "length": (9, 9, 9)})
    assert profile_for(manifest, "chat_decoder", {"past": (0, 96, 511)}).past == (0, 96, 511)
    assert profile_for(manifest, "chat_decoder", profile_from(batch="1,2,3")).past == (0, 96, 256)


def test_a_size_that_no_component_has_is_refused(tmp_path: Path) -> None:
    checkpoint = write_internvl(tmp_path / "checkpoint").path
    options = ExportOptions(
        checkpoint=checkpoint,
        out=tmp_path / "out",
        components=("vision", "decoder"),
        cache_capacity=40,
        verify="none",
    )
    manifest = compiler.export(options).manifest
    past = {"past": (0, 8, 20)}
    with pytest.raises(UsageError, match="found vision; leave --past out"):
        require_buildable(manifest, (), ["vision"], past)
    with pytest.raises(UsageError, match="found vision, decoder, as --cache-capacity fixed"):
        require_buildable(manifest, (), None, past)
    require_buildable(manifest, (), ["vision"], profile_from(batch="1,2,3"))


def test_usual_sizes_are_cut_to_a_small_model(tmp_path: Path) -> None:
    checkpoint = write_internvl(tmp_path / "checkpoint").path  # of 128 positions
    options = ExportOptions(
        checkpoint=checkpoint, out=tmp_path / "out", components=("decoder",), verify="none"
    )
    manifest = compiler.export(options).manifest
    for asked in (None, {"batch": (1, 2, 3)}, profile_from(batch="1,2,3")):
        assert profile_for(manifest, "decoder", asked).past == (0, 96, 127)


def test_engines_are_added_to_a_published_directory(tmp_path: Path) -> None:
    written = write_internvl(tmp_path / "checkpoint")
    options = ExportOptions(
        checkpoint=written.path, out=tmp_path / "out", precision="fp16", components=("image_pool",)
    )
    before = compiler.export(options)
    assert before.manifest.engines == ()
    profile = compiler.profile_from(batch="1,2,3", length="1,8,16")
    (engine,) = compiler.build(tmp_path / "out", ["tensorrt-rtx"], profile=profile)
    after = open_artifact(tmp_path / "out")
    assert after.manifest.engines == (engine,)
    sidecar = json.loads(after.file(engine.sidecar).read_text())
    assert sidecar["profile"]["batch"] == [1, 2, 3]
    assert not list((tmp_path / "out").glob("**/*.partial"))


def test_an_engine_that_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write_internvl(tmp_path / "checkpoint")
    options = ExportOptions(
        checkpoint=written.path, out=tmp_path / "out", precision="fp16", components=("image_pool",)
    )
    compiler.export(options)
    monkeypatch.setattr(memory, "available_memory", lambda: 200_000_000)
    with pytest.raises(ResourceError, match=r"image_pool: .* of memory to build, 0.20 GB are free"):
        compiler.build(tmp_path / "out", ["tensorrt-rtx"])
    assert open_artifact(tmp_path / "out").manifest.engines == ()


def test_merged_weights_count_twice() -> None:
    def nbytes(component: str, precision: str) -> float:
        return memory.builder_nbytes(component, 10**9, 4, precision) / 1e9

    for precision, more in (("int4-wo", 0.66), ("int8", 0.28), ("bf16", 0.24)):
        assert nbytes("vision", precision) == pytest.approx(1.254)
        assert nbytes("text_embed", precision) == pytest.approx(1.254 + more)
    assert nbytes("text_embed", "vision=int8, decoder = int4-wo") == pytest.approx(1.254 + 0.66)
    assert nbytes("chat_queries", "int8") == pytest.approx(1.254 + 0.24)
    for decoder in ("decoder", "chat_decoder"):  # in the engine, and for either of its profiles
        assert nbytes(decoder, "bf16") == pytest.approx(1.254 + 3 * 0.66)
