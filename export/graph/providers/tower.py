"""A graph rewritten in ONNX Runtime's own operators, for its CUDA provider: fewer, longer kernels.

The published graph has standard operators alone, which every builder reads. ONNX Runtime runs most
of them as a kernel each, and a kernel that only adds or normalises moves the residual stream
through memory once more. The rewrite computes the same from the same weights:

    norm(x + (y + b))             SkipSimplifiedLayerNormalization, or SkipLayerNormalization: its
                                  fourth output is the sum, the residual stream that goes on
    x Wᵀ, W (N, K) as stored      FusedMatMul with ``transB``: nothing is transposed at opening
    patches by a convolution      the product that it is where strides are the kernel's size
    attention without a mask      MultiHeadAttention, which cuDNN computes on Hopper and later

Where anything in a graph is not exactly of these forms, it is not rewritten at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from internvl_edge.export.graph.bf16_twin import infer_dtypes

CONTRIB, VERSION = "com.microsoft", 1
SKIP_NORMS = {
    "RMSNormalization": "SkipSimplifiedLayerNormalization",
    "LayerNormalization": "SkipLayerNormalization",
}
PLAIN = {"is_causal": 0, "qk_matmul_output_mode": 0, "softcap": 0.0}  # as if an Attention had none


def take_cuda_form(model: ir.Model, *, multi_head: bool = True) -> bool:
    """Rewrite a graph that is bound to its weights, in place.

    Args:
        model: of a component that computes in one dtype throughout.
        multi_head: let attention without a mask be MultiHeadAttention, which needs cuDNN.

    Returns:
        False where it is not a tower that can be rewritten as a whole; it is then of no use.
    """
    graph = model.graph
    infer_dtypes(graph)
    norms = [node for node in graph if _added(node) is not None]
    patches = [node for node in graph if node.op_type == "Conv"]
    is_done = bool(norms) and all(take_patches(graph, node) for node in patches)
    is_done = is_done and all(_take_norm(graph, node) for node in norms)
    is_done = is_done and all(_take_product(node) for node in graph if node.op_type == "MatMul")
    if not is_done:
        return False
    if multi_head:
        for node in graph:
            if node.op_type == "Attention" and _is_plain(node):
                _take_multi_head(node)
    graph.sort()  # a gain may be cast after the sum that its norm's new node stands for
    passes.RemoveUnusedNodesPass()(model)
    model.opset_imports[CONTRIB] = VERSION
    return True


# --- residual, bias and norm ---------------------------------------------------------------------


def _added(norm: ir.Node) -> ir.Node | None:
    """Find the sum of two activations that a norm reads, as it does on a residual stream."""
    if norm.op_type not in SKIP_NORMS:
        return None
    added = _producer(norm.inputs[0], "Add")
    is_sum = added is not None and not any(is_stored(value) for value in added.inputs)
    return added if is_sum else None


def _take_norm(graph: ir.Graph, norm: ir.Node) -> bool:
    """Make one node of a norm, the sum that it reads and the bias of what was added."""
    added = _added(norm)
    if added is None:  # another norm of the same sum took it
        return True
    attributes, (total, gain, *shift) = norm.attributes, norm.inputs
    if attributes.get_int("axis", -1) != -1 or attributes.get_int("stash_type", 1) != 1:
        return False
    (stream, bias), (branch, own) = (_unbiased(value) for value in added.inputs)
    if bias is not None and own is not None:
        return False
    bias = own if bias is None else bias
    shift = shift or [None] * (norm.op_type == "LayerNormalization")
    inputs = [stream, branch, gain, *shift, bias]
    shapes = {str(value.shape) for value in (total, *added.inputs) if value is not None}
    widths = {_sizes(value)[-1] for value in (gain, *shift, bias, total) if value is not None}
    dtypes = {value.dtype for value in inputs if value is not None}
    if len(shapes) != 1 or len(widths) != 1 or len(dtypes) != 1 or _rank(total) != 3:
        return False
    fused = ir.node(
        SKIP_NORMS[norm.op_type],
        inputs,
        {"epsilon": attributes.get_float("epsilon", 1e-5)},
        domain=CONTRIB,
        num_outputs=4,
        name=f"{norm.name}/{SKIP_NORMS[norm.op_type]}",
    )
    graph.insert_before(added, fused)
    for value in fused.outputs[1:3]:  # statistics, which nothing reads
        value.name = ""
    replace(norm.outputs[0], fused.outputs[0])
    replace(added.outputs[0], fused.outputs[3])
    return True


def _unbiased(value: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    """Part a value into what a stored vector was added to, and that vector, if nothing else is."""
    node = _producer(value, "Add")
    if node is None or len(node.outputs[0].uses()) != 1:
        return value, None
    vectors = [term for term in node.inputs if is_stored(term) and _rank(term) == 1]
    others = [term for term in node.inputs if not is_stored(term)]
    return (others[0], vectors[0]) if len(vectors) == len(others) == 1 else (value, None)


# --- products ------------------------------------------------------------------------------------


def _take_product(product: ir.Node) -> bool:
    """Let a product of a stored matrix read it as it lies; products of activations stay."""
    transpose = _producer(product.inputs[1], "Transpose")
    if transpose is None:
        return not is_stored(product.inputs[1]) or _rank(product.inputs[1]) == 2
    weight = transpose.inputs[0]
    if not is_stored(weight):
        return True
    if _rank(weight) != 2 or transpose.attributes.get_ints("perm", (1, 0)) != (1, 0):
        return False
    product.replace_input_with(1, weight)
    _become(product, "FusedMatMul", {"transB": 1})
    return True


def take_patches(graph: ir.Graph, conv: ir.Node) -> bool:
    """Make the product of a convolution whose strides are its kernel's size: (B, g², C) of patches.

    The Reshape and the Transpose after it, (B, C, g, g) → (B, g², C), go with it.
    """
    pixels, weight, *rest = conv.inputs
    bias = rest[0] if rest else None
    flat = _only_reader(conv.outputs[0], "Reshape")
    last = None if flat is None else _only_reader(flat.outputs[0], "Transpose")
    sizes, kernel = _sizes(pixels), _sizes(weight)
    if flat is None or last is None or len(sizes) != 4 or len(kernel) != 4 or not is_stored(weight):
        return False
    assert pixels is not None and weight is not None
    width, channels, patch, other = kernel
    rows, columns = (size // patch for size in sizes[2:])
    attributes = conv.attributes
    is_partition = (
        patch == other
        and sizes[1:] == [channels, rows * patch, columns * patch]
        and tuple(attributes.get_ints("strides", ())) == (patch, patch)
        and not any(attributes.get_ints("pads", ()))
        and all(step == 1 for step in attributes.get_ints("dilations", ()))
        and attributes.get_int("group", 1) == 1
        and attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
        and _sizes(flat.outputs[0])[1:] == [width, rows * columns]
        and tuple(last.attributes.get_ints("perm", ())) == (0, 2, 1)
    )
    if not is_partition or not _flatten(weight, width):
        return False
    name, inner = str(conv.name), channels * patch * patch
    split = [0, channels, rows, patch, columns, patch]
    made = [ir.node("Reshape", [pixels, constant(graph, f"{name}.split", split)])]
    made.append(ir.node("Transpose", made[-1].outputs, {"perm": [0, 2, 4, 1, 3, 5]}))
    joined = constant(graph, f"{name}.joined", [0, rows * columns, inner])
    made.append(ir.node("Reshape", [made[-1].outputs[0], joined]))
    made.append(ir.node("MatMul", [made[-1].outputs[0], weight]))
    _become(made[-1], "FusedMatMul", {"transB": 1})
    if bias is not None:
        made.append(ir.node("Add", [made[-1].outputs[0], bias]))
    for number, node in enumerate(made):
        node.name = node.outputs[0].name = f"{name}/{node.op_type}_{number}"
        node.outputs[0].type = pixels.type
    graph.insert_before(conv, made)
    replace(last.outputs[0], made[-1].outputs[0])
    return True


def _flatten(weight: ir.Value, width: int) -> bool:
    """Give a stored kernel, or the one that is cast, the shape of a matrix: the same bytes."""
    cast = weight.producer()
    values = [weight] if cast is None else [weight, cast.inputs[0]]
    stored = values[-1]
    tensor = None if stored is None else stored.const_value
    if not isinstance(tensor, ir.ExternalTensor) or any(len(v.uses()) != 1 for v in values if v):
        return False
    shape = ir.Shape([width, math.prod(tensor.shape.numpy()) // width])
    for value in values:
        assert value is not None
        value.shape = shape
    assert stored is not None
    stored.const_value = ir.ExternalTensor(
        tensor.location,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=shape,
        name=str(stored.name),
        base_dir=tensor.base_dir,
    )
    return True


# --- attention -----------------------------------------------------------------------------------


def _is_plain(node: ir.Node) -> bool:
    """Tell whether an attention is softmax(q kᵀ / √d) v of (B, T, heads·d), with as many keys."""
    attributes, heads = node.attributes, node.attributes.get_int("q_num_heads", 0)
    return (
        sum(value is not None for value in node.inputs) == 3
        and sum(bool(value.uses()) for value in node.outputs) == 1
        and all(_rank(value) == 3 for value in node.inputs[:3])
        and heads == attributes.get_int("kv_num_heads", 0) > 0
        and all(attributes[name].value == PLAIN[name] for name in PLAIN if name in attributes)
        and set(attributes) <= {"q_num_heads", "kv_num_heads", "scale", *PLAIN}
    )


def _take_multi_head(node: ir.Node) -> None:
    heads, scale = node.attributes["q_num_heads"].as_int(), node.attributes.get("scale")
    given = {} if scale is None else {"scale": scale.as_float()}
    _become(node, "MultiHeadAttention", {"num_heads": heads} | given)


# --- values and nodes ----------------------------------------------------------------------------


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def _only_reader(value: ir.Value, op_type: str) -> ir.Node | None:
    readers = [use.node for use in value.uses()]
    return readers[0] if len(readers) == 1 and readers[0].op_type == op_type else None


def is_stored(value: ir.Value | None) -> bool:
    """Tell whether a value is a weight or a constant, or a cast of one."""
    cast = _producer(value, "Cast")
    source = value if cast is None else cast.inputs[0]
    return source is not None and source.is_initializer()


def _sizes(value: ir.Value | None) -> list[int]:
    """List a value's dimensions, -1 where they are dynamic; none where they are not known."""
    shape = None if value is None else value.shape
    return [] if shape is None else [n if isinstance(n, int) else -1 for n in shape]


def _rank(value: ir.Value | None) -> int:
    return len(_sizes(value))


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let a new value stand for an old one, with its name."""
    name, new.type, new.shape = old.name, old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = f"{name}.replaced", name


def _become(node: ir.Node, op_type: str, attributes: dict[str, int | float]) -> None:
    """Turn a node into one of ONNX Runtime's, with the same inputs and outputs."""
    node.op_type, node.domain = op_type, CONTRIB
    node.attributes.clear()
    for name, value in attributes.items():
        if isinstance(value, int):
            node.attributes[name] = ir.AttrInt64(name, value)
        else:
            node.attributes[name] = ir.AttrFloat32(name, value)


def constant(graph: ir.Graph, name: str, sizes: Sequence[int]) -> ir.Value:
    tensor = ir.tensor(np.array(sizes, np.int64), name=name)
    value = ir.Value(name=name, shape=ir.Shape([len(sizes)]), type=ir.TensorType(tensor.dtype))
    value.const_value = tensor
    graph.register_initializer(value)
    return value
