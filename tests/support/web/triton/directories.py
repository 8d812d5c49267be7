"""A compiled directory of every component, made by hand: what writes a repository reads of one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnx import TensorProto, helper
from support.artifacts import file_record

from internvl_edge.artifact.components import COMPONENTS, Component
from internvl_edge.artifact.manifest import ComponentRecord, EngineRecord, Manifest, TensorSpec
from internvl_edge.artifact.sidecar import EngineInfo, ShapeRanges

SIZE, EMBEDDING = 28, 6
LANGUAGE = {"vocab_size": 9, "max_position_embeddings": 64, "num_hidden_layers": 1}
MODELS: dict[str, dict[str, Any]] = {
    "internvl": {"internvl": {"num_query_token": 2, "qllama": LANGUAGE}},
    "chat": {
        "chat": {
            "template": "internvl2_5",
            "pad2square": False,
            "dynamic_image_size": True,
            "use_thumbnail": True,
            "min_dynamic_patch": 1,
            "max_dynamic_patch": 12,
            "num_queries": 0,
            "llama": LANGUAGE,
        }
    },
}


def write_directory(
    directory: Path,
    kind: str = "internvl",
    components: Sequence[str] | None = None,
    *,
    precision: str = "fp32",
    op: str = "Identity",
    data_type: int = TensorProto.FLOAT,
    engines: Sequence[EngineInfo] = (),
    more: dict[str, bytes] | None = None,
) -> Path:
    """Write one.

    Args:
        directory: where; it must not exist.
        kind: of checkpoint.
        components: which; None: all of the kind but those that a key asks for.
        precision: as the manifest says it.
        op: the operator of each graph.
        data_type: of their weights.
        engines: their sidecars; each has a file of its own.
        more: further files, such as another graph of a component.
    """
    directory.mkdir(parents=True)
    chosen = [
        component
        for name, component in COMPONENTS.items()
        if (name in components if components is not None else kind in component.kinds)
        and component.needs != "num_queries"
    ]
    files = {"README.md": b"# tiny\n", "tokenizer.model": b"tokens", "report.html": b"<p>"}
    files["weights.bin"] = bytes(64)
    records = {}
    for component in chosen:
        record, graph = _component(component, op, data_type)
        records[component.name] = record
        files[record.file] = graph
        files[f"{component.name}.fp16.onnx"] = graph
    listed = []
    for i, info in enumerate(engines):
        plan = f"engines/{info.component}.{info.target}-{i:08x}.plan"
        sidecar = plan.replace(".plan", ".json")
        files |= {plan: bytes(info.nbytes), sidecar: json.dumps(info.to_json()).encode()}
        listed.append(
            EngineRecord(component=info.component, target=info.target, file=plan, sidecar=sidecar)
        )
    files |= more or {}
    manifest = Manifest(
        tool_version="0.1.0",
        precision=precision,
        model={"kind": kind, "vision": {"num_hidden_layers": 1}, **MODELS[kind]},
        image_size=SIZE,
        preprocessing={"size": SIZE},
        recipe=None,
        source={"checkpoint": "tiny", "files": {}, "weights": {"weights.bin": "hard link"}},
        components=records,
        engines=tuple(listed),
        files={name: file_record(data) for name, data in files.items()},
    )
    for name, data in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(data)
    (directory / "manifest.json").write_bytes(manifest.to_bytes())
    return directory


def _component(component: Component, op: str, data_type: int) -> tuple[ComponentRecord, bytes]:
    sizes: dict[str, tuple[int | str, ...]] = {
        "pixel_values": ("batch", 3, SIZE, SIZE),
        "image_embeds": ("batch", EMBEDDING),
        "text_embeds": ("batch", EMBEDDING),
    }
    inputs, outputs = (
        tuple(
            TensorSpec(name=name, dtype="float32", shape=sizes.get(name, ("batch", "length")))
            for name in names
        )
        for names in (component.inputs, component.outputs)
    )
    record = ComponentRecord(
        file=f"{component.name}.onnx", inputs=inputs, outputs=outputs, nbytes=4, verification=None
    )
    return record, graph_of(component, op, data_type)


def graph_of(component: Component, op: str, data_type: int) -> bytes:
    """A graph that passes the gate, with a tensor in ``weights.bin``."""
    nbytes = helper.tensor_dtype_to_np_dtype(data_type).itemsize
    tensor = TensorProto(name="w", data_type=data_type, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "weights.bin"), ("length", str(nbytes))):
        tensor.external_data.add(key=key, value=value)
    nodes = [helper.make_node(op, [component.inputs[0]], [name]) for name in component.outputs]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in component.inputs],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in component.outputs],
        [tensor],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return bytes(model.SerializeToString())


def engine(component: str, **changed: Any) -> EngineInfo:
    """The sidecar of an engine that Triton can run."""
    info = EngineInfo(
        component=component,
        target="tensorrt",
        precision="fp16",
        builder_version="10.16.1.11",
        tool_version="0.1.0",
        compute_capabilities=("SM89",),
        minimum_sm=89,
        profile=ShapeRanges(batch=(1, 4, 16)),
        onnx_sha256="ab" * 32,
        nbytes=12,
        sha256="cd" * 32,
        fused_attention=1,
        decomposed_attention=0,
        build_seconds=1.5,
        inputs=(TensorSpec(name="pixel_values", dtype="float32", shape=("batch", 3, SIZE, SIZE)),),
        outputs=(TensorSpec(name="image_embeds", dtype="float32", shape=("batch", EMBEDDING)),),
    )
    return replace(info, **changed)
