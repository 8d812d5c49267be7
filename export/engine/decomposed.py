"""Attention that a builder may decompose, marked in the graph that it parses.

Without a fused kernel for an attention, a build fails unless the layer is decomposable into MatMul,
Softmax and MatMul. The parsers of TensorRT and TensorRT-RTX read that from an attribute of the node
that is not ONNX's, so it is written into the bytes that are parsed, never into a published graph.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator

__all__ = ["decomposable"]

ATTENTION = b"Attention"
# AttributeProto: name = 1, i = 3, type = 20 (INT is 2)
_NAME = b"TRT_decomposable"
_ATTRIBUTE = b"\x0a" + bytes([len(_NAME)]) + _NAME + b"\x18\x01\xa0\x01\x02"
_UNNAMED = b"node_of_"  # how parsers begin the name of a node without one, before its output's
_MODEL_GRAPH, _GRAPH_NODE = 7, 1
_NODE_OUTPUT, _NODE_NAME, _NODE_OP, _NODE_ATTRIBUTE = 2, 3, 4, 5
_BYTES = 2  # the wire type of texts and messages


def decomposable(model: bytes, names: Container[str]) -> bytes:
    """Mark the Attention nodes of these names; a serialized ModelProto in, another out."""
    return _with_field(model, _MODEL_GRAPH, lambda graph: _graph(graph, names))


def _graph(graph: bytes, names: Container[str]) -> bytes:
    def marked(node: bytes) -> bytes:
        texts = {number: value for number, value, _ in _fields(node) if value is not None}
        name = texts.get(_NODE_NAME) or _UNNAMED + texts.get(_NODE_OUTPUT, b"")
        if texts.get(_NODE_OP) != ATTENTION or name.decode() not in names:
            return node
        return node + _field(_NODE_ATTRIBUTE, _ATTRIBUTE)

    return _with_field(graph, _GRAPH_NODE, marked)


def _with_field(message: bytes, number: int, change: Callable[[bytes], bytes]) -> bytes:
    """Change every field of a number; the others stay, byte for byte."""
    return b"".join(
        _field(number, change(value)) if found == number and value is not None else whole
        for found, value, whole in _fields(message)
    )


def _fields(message: bytes) -> Iterator[tuple[int, bytes | None, bytes]]:
    """Yield (number, what a field of ``_BYTES`` holds, the whole field)."""
    at = 0
    while at < len(message):
        start = at
        key, at = _varint(message, at)
        wire, value = key & 7, None
        if wire == _BYTES:
            size, at = _varint(message, at)
            value = message[at : at + size]
            at += size
        elif wire == 0:
            _, at = _varint(message, at)
        else:
            at += {1: 8, 5: 4}[wire]
        yield key >> 3, value, message[start:at]


def _field(number: int, value: bytes) -> bytes:
    return _encoded(number << 3 | _BYTES) + _encoded(len(value)) + value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, at, shift = value | (byte & 0x7F) << shift, at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _encoded(value: int) -> bytes:
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])
