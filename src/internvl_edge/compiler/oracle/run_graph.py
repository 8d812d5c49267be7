"""A component's graph, run by ONNX Runtime as its reference is run by PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from internvl_edge.errors import InternVLError
from internvl_edge.export.graph.bf16_twin import compute_in_float32, infer_dtypes, widen
from internvl_edge.export.graph.cuda_decoder import take_norms_apart
from internvl_edge.export.graph.cuda_form import take_cuda_form
from internvl_edge.export.graph.repeat import keep_block
from internvl_edge.export.graph.uint8_input import graph_feeds
from internvl_edge.quantize.graph.qdq import bypass_activations
from internvl_edge.quantize.graph.unsigned import take_unsigned_weights
from internvl_edge.runtime.generation.fixed_cache import MASK, capacity_of, grown, in_place
from internvl_edge.runtime.images.transform import Preprocessing
from internvl_edge.runtime.ort.cpu import products_saturate
from internvl_edge.runtime.ort.options import OrtOptions
from internvl_edge.runtime.ort.session import OrtSession
from internvl_edge.types import Array


def run_part(
    path: Path,
    tower: str | None,
    block: int | None,
    feeds: Mapping[str, Array],
    preprocessing: Preprocessing | None,
    *,
    unrounded: bool = False,
    fused: bool = False,
) -> dict[str, Array]:
    """Run the graph at ``path``, of its tower's blocks only one if it is given.

    Args:
        path: the graph.
        tower: its tower; None: it has none.
        block: the only one to keep; None: all.
        feeds: the reference's.
        preprocessing: of graphs that take levels.
        unrounded: compute in float32, and round no activation; weights stay as they are stored.
        fused: run it in the form that ONNX Runtime's CUDA provider is given.

    Raises:
        InternVLError: a mistake of ours: the graph has such a form, and a block of it has none.
    """
    model = ir.load(path)
    if block is not None and tower is not None:
        keep_block(model, tower, block)
    if fused and not take_cuda_form(model):
        raise InternVLError(f"{path}: block {block} alone has no form of its own for CUDA")
    if unrounded:
        if any(node.op_type == "QuantizeLinear" for node in model.graph):
            infer_dtypes(model.graph)
            bypass_activations(model)
        compute_in_float32(model)
    take_norms_apart(model)
    graph, options = runnable(model), OrtOptions(exact=True)
    with OrtSession(path, graph=graph, options=options) as session:
        # a cache has the graph's dtype, and one block's is one layer's
        return run_as_reference(session, feeds, preprocessing)


def open_graph(path: Path, model: ir.Model) -> OrtSession:
    """Open a graph that was changed in memory; its weights lie next to ``path``."""
    return OrtSession(path, graph=runnable(model))


def run_as_reference(
    session: OrtSession, feeds: Mapping[str, Array], preprocessing: Preprocessing | None
) -> dict[str, Array]:
    """Run a graph on the feeds of its reference: outputs in the shapes that the reference gives."""
    given = in_place(feeds, session.inputs)
    outputs = session.run(graph_feeds(session.inputs, given, preprocessing))
    if capacity_of(session.inputs) is None:
        return outputs
    return grown(outputs, feeds[MASK].shape[1])


def runnable(model: ir.Model) -> bytes:
    """Change a graph, in place, to one that ONNX Runtime computes correctly on this CPU."""
    widen(model)
    if products_saturate():
        take_unsigned_weights(model)
    graph: bytes = ir.to_proto(model).SerializeToString()
    return graph
