"""A component's graph, run by ONNX Runtime as its reference is run by PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from internvl_edge.export.graph.bf16_twin import compute_in_float32, infer_dtypes, widen
from internvl_edge.export.graph.providers.cpu import take_cpu_form
from internvl_edge.export.graph.providers.decoder import DIVISOR, GAINS, cuda_decoder
from internvl_edge.export.graph.providers.tower import take_cuda_form
from internvl_edge.export.graph.repeat import keep_block
from internvl_edge.export.graph.uint8_input import graph_feeds
from internvl_edge.quantize.graph.qdq import bypass_activations
from internvl_edge.quantize.graph.unsigned import take_unsigned_weights
from internvl_edge.runtime.generation.fixed_cache import (
    MASK,
    WRITE_INDICES,
    capacity_of,
    grown,
    in_place,
)
from internvl_edge.runtime.images.transform import Preprocessing
from internvl_edge.runtime.ort.cpu import products_saturate
from internvl_edge.runtime.ort.options import OrtOptions
from internvl_edge.runtime.ort.session import OrtSession
from internvl_edge.types import Array

Form = Callable[[ir.Model], ir.Model | None]  # which it rewrites; None: there is no such form


def run_part(
    path: Path,
    tower: str | None,
    block: int | None,
    feeds: Mapping[str, Array],
    preprocessing: Preprocessing | None,
    *,
    unrounded: bool = False,
    form: Form | None = None,
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
        form: run it as this rewrites it.
        device: what runs it.
        num_threads: of the processor; None: every core.
    """
    model = ir.load(path)
    if block is not None and tower is not None:
        keep_block(model, tower, block)
    if form is not None:
        whole = form(model)
        assert whole is not None, f"{path}: block {block} alone has no such form"
        model = whole
    if unrounded:
        if any(node.op_type == "QuantizeLinear" for node in model.graph):
            infer_dtypes(model.graph)
            bypass_activations(model)
        compute_in_float32(model)
    with _open(path, model, device, num_threads, exact=True) as session:
        # a cache has the graph's dtype, and one block's is one layer's
        return run_as_reference(session, feeds, preprocessing)


def rewrite_for_cpu(model: ir.Model) -> ir.Model | None:
    """Rewrite a decoder's graph for ONNX Runtime's CPU provider."""
    return model if take_cpu_form(model) else None


def rewrite_for_cuda(model: ir.Model) -> ir.Model | None:
    """Rewrite a graph for ONNX Runtime's CUDA provider; a decoder in float32, scaled as float16."""
    if any(value.name == WRITE_INDICES for value in model.graph.inputs):
        return cuda_decoder(model, ir.DataType.FLOAT, DIVISOR)
    return model if take_cuda_form(model) else None


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
    """Compute norms that a CPU has no kernels for by nodes of their own, in place.

    Those of heads inside of attention, and gated ones, which compute in float32 at any type.
    """
    graph = model.graph
    for node in [*graph]:
        if node.op_type == "GroupQueryAttention" and len(node.inputs) > GAINS:
            _take_head_norms(graph, node)
        if node.op_type == "GatedRMSNorm":
            _take_gated_norm(graph, node)


class _Apart:
    """Nodes that are put in front of another, and compute a part of it."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self._graph, self._node, self._count = graph, node, 0

    def add(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, int | float] | None = None,
        outputs: int = 1,
        dtype: ir.DataType | None = None,
    ) -> Sequence[ir.Value]:
        """Add a node; its values have the type of the first input, or ``dtype``."""
        made = ir.node(op_type, list(inputs), attributes, num_outputs=outputs)
        made.name = f"{self._node.name}.apart.{self._count}"
        self._count += 1
        first = inputs[0]
        for place, output in enumerate(made.outputs):
            output.name = f"{made.name}.{place}"
            output.type = first.type if first is not None else None
            if dtype is not None:
                output.type = ir.TensorType(dtype)
        self._graph.insert_before(self._node, made)
        return made.outputs

    def integers(self, *numbers: int) -> ir.Value:
        name = f"{self._node.name}.integers.{'_'.join(map(str, numbers))}"
        value = ir.Value(name=name, const_value=ir.tensor(np.array(numbers), name=name))
        self._graph.initializers[name] = value
        return value

    def cast(self, value: ir.Value | None, dtype: ir.DataType) -> ir.Value:
        (output,) = self.add("Cast", [value], {"to": int(dtype)}, dtype=dtype)
        return output


def _take_head_norms(graph: ir.Graph, node: ir.Node) -> None:
    apart, gains, past = _Apart(graph, node), node.inputs[GAINS:], node.inputs[3]
    heads, kv_heads = (node.attributes[n].as_int() for n in ("num_heads", "kv_num_heads"))
    assert past is not None and past.shape is not None
    size = int(past.shape[3])  # type: ignore[arg-type]
    sizes = apart.integers(*(count * size for count in (heads, kv_heads, kv_heads)))
    parts = [*apart.add("Split", [node.inputs[0], sizes], {"axis": -1}, outputs=3)]
    epsilon = node.attributes.pop("qk_norm_epsilon").as_float()
    for at, (gain, count) in enumerate(zip(gains, (heads, kv_heads), strict=True)):
        (x,) = apart.add("Reshape", [parts[at], apart.integers(0, 0, count, size)])
        (x,) = apart.add("RMSNormalization", [x, gain], {"epsilon": epsilon})
        (parts[at],) = apart.add("Reshape", [x, apart.integers(0, 0, count * size)])
    (joined,) = apart.add("Concat", parts, {"axis": -1})
    node.replace_input_with(0, joined)
    node.resize_inputs(GAINS - 4)


def _take_gated_norm(graph: ir.Graph, node: ir.Node) -> None:
    apart, dtype = _Apart(graph, node), ir.DataType.FLOAT
    x, scale, gate = (apart.cast(value, dtype) for value in node.inputs)
    given = node.inputs[1]
    assert given is not None and given.shape is not None and node.inputs[0] is not None
    size = int(given.shape[0])  # type: ignore[arg-type]
    (x,) = apart.add("Reshape", [x, apart.integers(0, 0, -1, size)])
    (x,) = apart.add(
        "RMSNormalization", [x, scale], {"epsilon": node.attributes["epsilon"].as_float()}
    )
    (flat,) = apart.add("Reshape", [x, apart.integers(0, 0, -1)])
    (opened,) = apart.add("Sigmoid", [gate])
    (silu,) = apart.add("Mul", [gate, opened])
    (y,) = apart.add("Mul", [flat, silu])
    kind = given.dtype
    assert kind is not None
    ir.convenience.replace_all_uses_with(
        node.outputs[0], apart.cast(y, kind), replace_graph_outputs=True
    )
    graph.remove(node, safe=True)
