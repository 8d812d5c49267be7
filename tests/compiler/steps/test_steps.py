"""The list of steps, and what its steps share: one model, one decision on weights, traces."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from support.checkpoints import (
    Written,
    write_chat,
    write_internvl,
    write_llava,
    write_llava_queries,
    write_vit,
)
from support.checkpoints.family import write_family
from support.runs.traces import SharedTraces

from internvl_edge import compiler
from internvl_edge.compiler import ExportOptions, Plan, make_plan, pipeline
from internvl_edge.compiler.progress import silent
from internvl_edge.compiler.steps import meta_model, trace, weights
from internvl_edge.compiler.steps.engines import BuildEngines
from internvl_edge.compiler.steps.step import Build
from internvl_edge.compiler.weights.plan import plan_weights
from internvl_edge.errors import InternVLError
from internvl_edge.export.config.checkpoint import available_components, load_config
from internvl_edge.export.graph.bind import weights_without_data


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_internvl(tmp_path_factory.mktemp("steps") / "checkpoint")


def plan_of(written: Written, out: Path, **more: Any) -> Plan:
    return make_plan(ExportOptions(checkpoint=written.path, out=out, **more))


def names(plan: Plan) -> list[str]:
    return [type(step).__name__ for step in pipeline.steps(plan)]


def test_the_steps_of_an_export(written: Written, tmp_path: Path) -> None:
    plain = ["Trace", "StoreWeights", "WriteGraphs", "Verify"]
    plain += ["CopyFiles", "ListFiles", "Publish"]
    plan = plan_of(written, tmp_path / "out")
    assert names(plan) == plain
    engines = replace(plan, options=replace(plan.options, targets=("tensorrt-rtx",)))
    assert names(engines) == [*plain[:-1], "BuildEngines", "Publish"]
    clip = replace(plan, options=replace(plan.options, layout="optimum"))
    assert names(clip) == [*plain[:5], "WriteClip", *plain[5:]]
    quantized = plan_of(written, tmp_path / "out", precision="int8", verify="none")
    assert names(quantized) == ["Trace", "Quantize", *plain[2:3], *plain[4:]]
    rows = [cost.name for cost in pipeline.forecast_plan(quantized).steps]
    assert rows == ["trace", "weights", "quantize"]


def test_engines_cost_what_an_export_with_them_says(written: Written, tmp_path: Path) -> None:
    options = ExportOptions(checkpoint=written.path, out=tmp_path / "out", components=("vision",))
    said = compiler.forecast(replace(options, targets=("tensorrt-rtx",))).steps[-1]
    manifest = compiler.export(replace(options, verify="none")).manifest
    (later,) = BuildEngines.of(manifest, ("tensorrt-rtx",)).costs()
    assert later == said


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_one_model_without_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """For the forecast, what is read, and the graphs at both bases."""
    built = []
    build_model = meta_model.build_model
    monkeypatch.setattr(meta_model, "build_model", lambda c: built.append(c) or build_model(c))
    path = write_vit(tmp_path / "checkpoint").path
    chosen = ExportOptions(
        checkpoint=path, out=tmp_path / "out", precision=precision, verify="none"
    )
    compiler.export(chosen)
    assert len(built) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "write", [write_internvl, write_vit, write_chat, write_llava, write_llava_queries]
)
def test_a_component_alone_reads_what_was_planned(write: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoint").path
    for name in available_components(load_config(path)):
        options = ExportOptions(checkpoint=path, out=tmp_path / "out", components=(name,))
        plan = make_plan(options)
        model = meta_model.shallow_model(plan)
        graphs = trace.trace_all(plan, model, plan.base, silent)
        planned = plan_weights(plan, model)
        assert set(weights_without_data(graphs.values())) == planned.reads[name], name


def test_weights_that_were_not_planned_are_a_mistake(written: Written, tmp_path: Path) -> None:
    plan = plan_of(written, tmp_path / "out", components=("image_pool",))
    model = meta_model.shallow_model(plan)
    planned = plan_weights(plan, model)
    graphs = trace.trace_all(plan, model, plan.base, silent)
    build = Build(
        directory=tmp_path,
        work=None,  # type: ignore[arg-type]
        report=silent,
        calibration=None,
        samples=None,
        models=graphs,
    )
    weights.require_as_planned(planned, build)
    reads = {"image_pool": planned.reads["image_pool"] | {"itm_head.weight"}}
    with pytest.raises(InternVLError, match=r"expected to read .*: itm_head\.weight"):
        weights.require_as_planned(replace(planned, reads=reads), build)


# --- traces --------------------------------------------------------------------------------------


def serialized(model: ir.Model) -> bytes:
    data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return data


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No traces yet; the inputs of each that is made."""
    made: list[str] = []
    run = trace.trace

    def counted(*args: Any) -> ir.Model:
        made.append(",".join(args[3]))
        return run(*args)

    monkeypatch.setattr(trace, "_kept", trace._Kept(trace.MAX_KEPT_NBYTES))
    monkeypatch.setattr(trace, "trace", counted)
    return made


def traced(plan: Plan) -> dict[str, ir.Model]:
    return trace.trace_all(plan, meta_model.shallow_model(plan), plan.base, silent)


def test_a_trace_is_made_once_and_changed_by_nobody(
    written: Written, tmp_path: Path, kept: list[str]
) -> None:
    plan = plan_of(written, tmp_path / "out", components=("image_pool",))
    first = traced(plan)["image_pool"]
    before = serialized(first)
    for node in list(first.graph):
        node.name = "spoiled"
        for value in node.outputs:
            value.shape = None
    for value in first.graph.inputs:
        value.shape[0] = 7  # type: ignore[index]
    assert serialized(traced(plan)["image_pool"]) == before
    assert len(kept) == 1
    traced(plan_of(written, tmp_path / "out", components=("image_pool",), precision="fp16"))
    assert len(kept) == 2, "of another dtype"


@pytest.mark.slow
def test_folding_a_tower_is_not_seen_from_outside(
    written: Written, tmp_path: Path, kept: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At fp8 the vision tower has no LayerScale any more; what reads its output is the same."""
    chosen = ("vision", "image_pool", "text_embed")
    traced(plan_of(written, tmp_path / "out", components=chosen, weights="copy"))  # which keeps it
    fp8 = plan_of(written, tmp_path / "out", components=chosen, precision="fp8")
    shared = traced(fp8)
    assert len(kept) == 4 and kept[-1] == kept[0] == "pixel_values"
    monkeypatch.setattr(trace, "_kept", trace._Kept(0))
    alone = traced(fp8)
    assert len(kept) == 7
    assert {n: serialized(m) for n, m in shared.items()} == {
        n: serialized(m) for n, m in alone.items()
    }


@pytest.mark.slow
def test_the_vision_side_of_a_chat_is_traced_once(
    tmp_path: Path, kept: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its language model is, the capacity of that one's cache, and how it is asked."""
    qwen = write_family(tmp_path / "qwen2", "qwen2")
    others = [qwen, write_family(tmp_path / "phi3", "phi3", "hf")]
    plans = [plan_of(one, tmp_path / "out", components=("chat_vision",)) for one in others]
    shared = [serialized(traced(plan)["chat_vision"]) for plan in plans]
    traced(plan_of(qwen, tmp_path / "out", cache_capacity=40))
    assert [inputs.partition(",")[0] for inputs in kept] == ["pixel_values", "inputs_embeds"]
    monkeypatch.setattr(trace, "_kept", trace._Kept(0))
    assert [serialized(traced(plan)["chat_vision"]) for plan in plans] == shared
    wide = write_family(tmp_path / "wide", "qwen2", language={"hidden_size": 96})
    plan = plan_of(wide, tmp_path / "out", components=("chat_vision",))
    assert serialized(traced(plan)["chat_vision"]) != shared[0]


@pytest.mark.slow
def test_a_trace_that_workers_share_is_the_trace(
    written: Written, tmp_path: Path, kept: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(written, tmp_path / "out", components=("image_pool", "decoder"))
    alone = traced(plan)
    assert len(kept) == 2
    for made in (4, 4):  # by the first worker; by none, as the second one reads them
        monkeypatch.setattr(trace, "_kept", SharedTraces(tmp_path))
        shared = traced(plan)
        assert len(kept) == made
        for name, graph in alone.items():
            assert serialized(shared[name]) == serialized(graph)


def test_traces_are_bounded(written: Written, tmp_path: Path, kept: list[str]) -> None:
    plan = plan_of(written, tmp_path / "out", components=("image_pool",))
    graph = traced(plan)["image_pool"]
    room = trace._Kept(int(2.5 * trace._nbytes(graph)))
    for key in "abca":
        room.get(key, lambda: graph)
    assert list(room._graphs) == ["c", "a"], "the one used longest ago goes first"
