"""Graph files of a directory, of which engines are built: names, inputs, fingerprints."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec

from internvl_edge.artifact import Manifest, TensorSpec
from internvl_edge.artifact.components import COMPONENTS, engine_graph, find_component
from internvl_edge.export.engine.build import Prepare

COMPUTE_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def graph_file(manifest: Manifest, component: str) -> str:
    """Find the graph that a component's engines are built from."""
    base = (manifest.recipe or {}).get("engine_base")
    other = engine_graph(component, str(base))
    return other if other in manifest.files else manifest.components[component].file


def graph_base(manifest: Manifest, component: str) -> str:
    """Name what the graph that engines are built from computes in, products in 8 bits apart."""
    if manifest.recipe is None:
        return manifest.precision
    is_published = graph_file(manifest, component) == manifest.components[component].file
    return str(manifest.recipe["base" if is_published else "engine_base"] or "fp32")


def engine_inputs(manifest: Manifest, component: str, source: str) -> tuple[TensorSpec, ...]:
    """List the component's inputs; of a graph for engines, a cache has its compute type."""
    record, base = manifest.components[component], source.split(".")[1]
    if source == record.file:
        return record.inputs
    return tuple(
        replace(spec, dtype=COMPUTE_DTYPES[base]) if spec.name.startswith("past_") else spec
        for spec in record.inputs
    )


def fingerprint(manifest: Manifest, graph: str) -> str:
    """Identify a graph together with the weights files it may read.

    A linked shard counts by its header, whether or not ``verify --full`` has hashed the rest.
    """
    names = [graph, *sorted(n for n in manifest.files if n.endswith(".safetensors"))]
    files = [manifest.files[name] for name in names]
    hashes = "".join(str(file.header_sha256 or file.sha256) for file in files)
    return hashlib.sha256(hashes.encode()).hexdigest()


def preparation(component: str) -> Prepare:
    """Choose what is done to a graph for its builder: a language model's pairs are joined.

    That needs onnx-ir. Where only engines are built it may be missing, and the memory for what the
    builder joins is there or not.
    """
    if not find_component(component).is_language or find_spec("onnx_ir") is None:
        return nullcontext
    from internvl_edge.export.graph.join_pairs import joined_graph

    return joined_graph


def num_blocks(manifest: Manifest, component: str) -> int:
    llama, known = manifest.language_model, find_component(component)
    if component in COMPONENTS and known.tower is None:
        return 0
    if known.is_language and llama is not None:
        return int(llama["num_hidden_layers"])
    return int(manifest.model["vision"]["num_hidden_layers"])
