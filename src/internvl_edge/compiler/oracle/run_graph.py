"""A component's graph, run by ONNX Runtime as its reference is run by PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from internvl_edge.errors import InternVLError
from internvl_edge.export.graph.bf16_twin import compute_in_float32, infer_dtypes, widen
from internvl_edge.export.graph.cuda.decoder import GAINS
from internvl_edge.export.graph.cuda.tower import take_cuda_form
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
    device: str = "cpu",
    num_threads: int | None = None,
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
        device: what runs it.
        num_threads: of the processor; None: every core.

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
    with _open(path, model, device, num_threads, exact=True) as session:
        # a cache has the graph's dtype, and one block's is one layer's
        return run_as_reference(session, feeds, preprocessing)


def open_graph(
    path: Path, model: ir.Model, device: str = "cpu", num_threads: int | None = None
) -> OrtSession:
    """Open a graph that was changed in memory; its weights lie next to ``path``."""
    return _open(path, model, device, num_threads)


def _open(
    path: Path, model: ir.Model, device: str, num_threads: int | None, *, exact: bool = False
) -> OrtSession:
    """Open a graph; on a GPU quantized ones, too, as slow as they may be there."""
    options = OrtOptions(num_threads=num_threads, exact=exact, allow_slow=True, graphs=False)
    return OrtSession(path, graph=runnable(model), device=device, options=options)


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
    take_norms_apart(model)
    widen(model)
    if products_saturate():
        take_unsigned_weights(model)
    graph: bytes = ir.to_proto(model).SerializeToString()
    return graph


def take_norms_apart(model: ir.Model) -> None:
    """Compute norms of heads by nodes of their own, in place: attention on a CPU has none."""
    graph = model.graph
    for node in [node for node in graph if node.op_type == "GroupQueryAttention"]:
        if len(node.inputs) <= GAINS:
            continue
        qkv, gains = node.inputs[0], node.inputs[GAINS:]
        heads, kv_heads = (node.attributes[n].as_int() for n in ("num_heads", "kv_num_heads"))
        past = node.inputs[3]
        assert past is not None and past.shape is not None
        size = int(past.shape[3])  # type: ignore[arg-type]

        def integers(*numbers: int) -> ir.Value:
            name = f"{node.name}.integers.{'_'.join(map(str, numbers))}"  # noqa: B023
            value = ir.Value(name=name, const_value=ir.tensor(np.array(numbers), name=name))
            graph.initializers[name] = value
            return value

        made = [
            ir.node(
                "Split",
                [qkv, integers(*(n * size for n in (heads, kv_heads, kv_heads)))],
                {"axis": -1},
                num_outputs=3,
            )
        ]
        parts = list(made[0].outputs)
        epsilon = node.attributes.pop("qk_norm_epsilon").as_float()
        for at, (gain, count) in enumerate(zip(gains, (heads, kv_heads), strict=True)):
            made.append(ir.node("Reshape", [parts[at], integers(0, 0, count, size)]))
            made.append(
                ir.node("RMSNormalization", [made[-1].outputs[0], gain], {"epsilon": epsilon})
            )
            made.append(ir.node("Reshape", [made[-1].outputs[0], integers(0, 0, count * size)]))
            parts[at] = made[-1].outputs[0]
        made.append(ir.node("Concat", parts, {"axis": -1}))
        for number, one in enumerate(made):
            one.name = f"{node.name}.apart.{number}"
            for place, output in enumerate(one.outputs):
                output.name = f"{one.name}.{place}"
                output.type = qkv.type if qkv is not None else None
        graph.insert_before(node, made)
        node.replace_input_with(0, made[-1].outputs[0])
        node.resize_inputs(GAINS - 4)
