"""Protobuf's wire format, read by a schema: an ONNX file as dictionaries, without its weights.

The wire format is a sequence of fields, each a varint key = number << 3 | type and a value:
    0  varint: 7 bits a byte, least significant first, the high bit says that more follow
    1  8 bytes      5  4 bytes      2  a varint length and that many bytes (text, message, array)
Nothing in it nests but type 2, and a field that is not needed is stepped over by its length, so a
graph costs its nodes and never its weights. Stricter than protobuf where parsers could differ: a
field that may stand once must not stand twice (they merge or replace), and a known field must
have its known type (they ignore it).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from internvl_edge.errors import ArtifactError

MAX_NBYTES = 2**31 - 1  # protobuf's own limit
MAX_DEPTH = 32  # messages inside one another; each subgraph takes three
MAX_FIELDS = 300_000  # in a whole file: a second; 48 transformer layers have 30 thousand

Message = dict[str, Any]

# message → field number → (name, kind), of what is looked at. A kind is int, text, bytes, the
# name of a message, or count4/count8/counts: how many 4-byte, 8-byte, varint entries there are.
# A star: may be repeated.
SCHEMA: dict[str, dict[int, tuple[str, str]]] = {
    "Model": {
        1: ("ir_version", "int"),
        7: ("graph", "Graph"),
        8: ("opset_import", "Opset*"),
        20: ("training_info", "bytes*"),
        25: ("functions", "Function*"),
    },
    "Opset": {1: ("domain", "text"), 2: ("version", "int")},
    "Function": {
        1: ("name", "text"),
        7: ("nodes", "Node*"),
        10: ("domain", "text"),
        11: ("attributes", "Attribute*"),
        13: ("overload", "text"),
    },
    "Graph": {
        1: ("nodes", "Node*"),
        5: ("initializers", "Tensor*"),
        11: ("inputs", "Value*"),
        12: ("outputs", "Value*"),
        15: ("sparse_initializers", "Sparse*"),
    },
    "Value": {1: ("name", "text")},
    "Node": {
        4: ("op_type", "text"),
        5: ("attributes", "Attribute*"),
        7: ("domain", "text"),
        8: ("overload", "text"),
    },
    "Attribute": {
        5: ("tensor", "Tensor"),
        6: ("graph", "Graph"),
        10: ("tensors", "Tensor*"),
        11: ("graphs", "Graph*"),
        22: ("sparse", "Sparse"),
        23: ("sparses", "Sparse*"),
    },
    "Sparse": {1: ("values", "Tensor"), 2: ("indices", "Tensor"), 3: ("dims", "int*")},
    "Tensor": {
        1: ("dims", "int*"),
        2: ("data_type", "int"),
        3: ("segment", "bytes"),
        4: ("float_data", "count4"),
        5: ("int32_data", "counts"),
        6: ("string_data", "bytes*"),
        7: ("int64_data", "counts"),
        8: ("name", "text"),
        9: ("raw_data", "bytes"),
        10: ("double_data", "count8"),
        11: ("uint64_data", "counts"),
        13: ("external_data", "Entry*"),
        14: ("data_location", "int"),
    },
    "Entry": {1: ("key", "text"), 2: ("value", "text")},
}
COUNTED = {"count4": 5, "count8": 1, "counts": 0}  # kind → wire type of one entry on its own
CONTINUED = bytes(range(128, 256))  # bytes of a varint but its last


def read_message(data: bytes, kind: str) -> Message:
    """Read a message of a kind of ``SCHEMA``.

    Returns:
        Field name → value, or list of values. An ``int`` is signed, ``bytes`` are a view of
        ``data``, counts are ints, fields that the schema lacks are left out.

    Raises:
        ArtifactError: it is cut off, broken, ambiguous, or beyond the limits of this module.
    """
    if len(data) > MAX_NBYTES:
        raise ArtifactError(f"more than {MAX_NBYTES} bytes")
    return _Reader().message(memoryview(data), kind)


class _Reader:
    """Reads messages by ``SCHEMA``; counts fields, so that no file is read forever."""

    def __init__(self) -> None:
        self.count = 0

    def message(self, data: memoryview, kind: str, depth: int = 1) -> Message:
        """Map each field's name to its value or list of values; unknown fields are skipped."""
        if depth > MAX_DEPTH:
            raise ArtifactError(f"more than {MAX_DEPTH} messages inside one another")
        fields: Message = {}
        for number, wire, value in self._fields(data):
            name, wanted = SCHEMA[kind].get(number, ("", ""))
            if not name:
                continue
            if wanted in COUNTED:
                fields[name] = fields.get(name, 0) + _count(value, wire, wanted)
            elif wanted == "int*" and wire == 2:
                fields.setdefault(name, []).extend(self._packed(value))
            else:
                item = self._value(value, wire, wanted.rstrip("*"), f"{kind}.{name}", depth)
                if wanted.endswith("*"):
                    fields.setdefault(name, []).append(item)
                elif name in fields:
                    raise ArtifactError(f"{kind}.{name} stands twice")
                else:
                    fields[name] = item
        return fields

    def _fields(self, data: memoryview) -> Iterator[tuple[int, int, Any]]:
        """Yield (number, wire type, value): an unsigned int, or the bytes it has."""
        at = 0
        while at < len(data):
            self._spend()
            key, at = _varint(data, at)
            number, wire = key >> 3, key & 7
            if wire == 0:
                value, at = _varint(data, at)
                yield number, wire, value
                continue
            if wire not in (1, 2, 5) or number == 0:
                raise ArtifactError(f"not ONNX: field {number} of wire type {wire}")
            size, at = _varint(data, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
            if size > len(data) - at:
                raise ArtifactError(f"cut off: {size} bytes announced, {len(data) - at} are left")
            yield number, wire, data[at : at + size]
            at += size

    def _value(self, value: Any, wire: int, wanted: str, where: str, depth: int) -> Any:
        if wire != (0 if wanted == "int" else 2):
            raise ArtifactError(f"not ONNX: {where} of wire type {wire}")
        if wanted == "int":
            return _signed(value)
        if wanted == "bytes":
            return value
        if wanted != "text":
            return self.message(value, wanted, depth + 1)
        try:
            return str(value, "utf-8")
        except UnicodeDecodeError as error:
            raise ArtifactError(f"not ONNX: {where} is not UTF-8") from error

    def _packed(self, data: memoryview) -> Iterator[int]:
        at = 0
        while at < len(data):
            self._spend()
            value, at = _varint(data, at)
            yield _signed(value)

    def _spend(self) -> None:
        self.count += 1
        if self.count > MAX_FIELDS:
            raise ArtifactError(f"more than {MAX_FIELDS} fields")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Read the number at a position, and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ArtifactError("cut off inside a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                break
            return value, at
    raise ArtifactError("not ONNX: a number of more than 64 bits")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _count(value: Any, wire: int, kind: str) -> int:
    """Count the entries of a list of numbers: one on its own, or many packed together."""
    if wire == COUNTED[kind]:
        return 1
    if wire != 2:
        raise ArtifactError(f"not ONNX: a list of numbers of wire type {wire}")
    if kind == "counts":
        return len(bytes(value).translate(None, CONTINUED))
    entries, rest = divmod(len(value), 4 if kind == "count4" else 8)
    if rest:
        raise ArtifactError("not ONNX: a list of numbers cut off")
    return entries
