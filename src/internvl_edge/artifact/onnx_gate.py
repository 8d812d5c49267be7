"""The gate before any native code: an ONNX file, read without a parser of ONNX.

Native parsers disagree about hostile files: some follow a path out of the directory, believe a
length of 2^50, or hang on a pipe. So the file is read here first, and only what every parser
understands alike passes on.

Values of a tensor lie in ``raw_data``, in a list of one entry per value, or in another file of the
directory: ``external_data`` = location, offset, length. All three must have exactly as many bytes
as dims and data type ask for, in a file that the caller's list has.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from internvl_edge.artifact.onnx_wire import MAX_NBYTES, Message, read_message
from internvl_edge.errors import ArtifactError
from internvl_edge.files.disk import open_regular

MAX_ELEMENTS = 2**48
MAX_RANK = 64  # dimensions of a tensor
# Of a graph, functions counted wherever they are called. ONNX Runtime takes time that grows with
# the square of it: 4 s for so many; 48 quantized transformer layers have 5 thousand.
MAX_NODES = 20_000
MAX_CALLS = 32  # of functions by functions
EXTERNAL_KEYS = ("location", "offset", "length", "checksum")

# TensorProto.DataType → bits of an element; a string has no size
STRING = 8
BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64}
BITS |= {14: 64, 15: 128, 16: 16, 17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8}
BITS |= {25: 2, 26: 2, 27: 6, 28: 6}
# the list that holds a type's values one by one, and entries per value; int32_data where absent
LISTS = {1: ("float_data", 1), 14: ("float_data", 2), 11: ("double_data", 1)}
LISTS |= {15: ("double_data", 2), 7: ("int64_data", 1), 12: ("uint64_data", 1)}
LISTS |= {13: ("uint64_data", 1)}
FLOAT8 = 17  # float8_e4m3fn
Called = tuple[str, str, str]  # a function's domain, name and overload
VALUES = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxSummary:
    """A sound ONNX file in a few words."""

    ir_version: int
    opset: int  # of the default domain
    domains: dict[str, int]  # every domain → version; the default one is ""
    node_count: int  # with those of subgraphs and functions
    op_types: Counter[str]  # "MatMul", "com.microsoft.Gelu"
    inputs: tuple[str, ...]  # that are no initializers
    outputs: tuple[str, ...]
    external_locations: tuple[str, ...]  # files that hold its tensors
    data_types: frozenset[int]  # of its tensors, FLOAT8 or others of DataType


def scan(
    source: Path | bytes, *, files: Mapping[str, int], where: str | None = None
) -> OnnxSummary:
    """Check an ONNX file and everything that it refers to.

    Args:
        source: the file, or its bytes.
        files: name → bytes of every file that its tensors may lie in.
        where: what to call it in errors; by default its path.

    Raises:
        ArtifactError: it is not ONNX, or a rule of this module is broken.
    """
    try:
        data = source if isinstance(source, bytes) else _read(source)
        return _summary(read_message(data, "Model"), files)
    except ArtifactError as error:
        name = where or ("ONNX model" if isinstance(source, bytes) else str(source))
        raise ArtifactError(f"{name}: {error}") from error


def check_sizes(model: Message) -> None:
    """Refuse tensors that no model has: of many dimensions, or of more elements than any disk.

    Raises:
        ArtifactError: names the tensor.
    """
    for root in (model.get("graph", {}), *model.get("functions", [])):
        for graph in _graphs(root):
            for tensor in _tensors(graph):
                _element_count(tensor, f"tensor {tensor.get('name', '')!r}")


def _read(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            data = file.read(MAX_NBYTES + 1)
    except OSError as error:
        raise ArtifactError(f"cannot be read: {error.strerror}") from error
    return data


def _summary(model: Message, files: Mapping[str, int]) -> OnnxSummary:
    ir_version, graph = model.get("ir_version", 0), model.get("graph", {})
    if ir_version <= 0:
        raise ArtifactError(f"not ONNX: expected a positive ir_version, found {ir_version}")
    if model.get("training_info"):
        raise ArtifactError("training information does not belong into a compiled component")
    domains = _domains(model)
    if not graph.get("nodes") or not graph.get("outputs"):
        raise ArtifactError("the graph has no nodes or no outputs")
    functions = model.get("functions", [])
    graphs = [part for root in (graph, *functions) for part in _graphs(root)]
    _check_nodes(graph, functions)
    tensors = [tensor for part in graphs for tensor in _tensors(part)]
    ranges: set[tuple[str, int, int]] = set()
    for tensor in tensors:
        ranges |= _check_tensor(tensor, files)
    _check_overlap(ranges)
    initializers = _initializer_names(graph)
    nodes = [node for part in graphs for node in part.get("nodes", [])]
    return OnnxSummary(
        ir_version=ir_version,
        opset=domains[""],
        domains=domains,
        node_count=len(nodes),
        op_types=Counter(_op_type(node) for node in nodes),
        inputs=tuple(n for n in _names(graph, "inputs") if n not in initializers),
        outputs=tuple(_names(graph, "outputs")),
        external_locations=tuple(sorted({location for location, _, _ in ranges})),
        data_types=frozenset(tensor.get("data_type", 0) for tensor in tensors),
    )


def _domains(model: Message) -> dict[str, int]:
    domains: dict[str, int] = {}
    for entry in model.get("opset_import", []):
        domain = entry.get("domain", "")
        domain = "" if domain == "ai.onnx" else domain
        if domain in domains or entry.get("version", 0) <= 0:
            raise ArtifactError(f"opset of domain {domain!r}: expected one version above 0")
        domains[domain] = entry["version"]
    if "" not in domains:
        raise ArtifactError(f"no opset of the default domain, only of {sorted(domains)}")
    return domains


def _called(message: Message, name: str) -> Called:
    return message.get("domain", ""), message.get(name, ""), message.get("overload", "")


def _check_nodes(graph: Message, functions: Sequence[Message]) -> None:
    """Bound the nodes that a parser makes of a graph: it puts a function wherever it is called.

    Raises:
        ArtifactError: more than ``MAX_NODES``, or functions that call themselves.
    """
    bodies = {_called(f, "name"): f for f in functions}
    if len(bodies) < len(functions):
        raise ArtifactError("two functions of one name")
    sizes: dict[Called, int] = {}
    under_way: set[Called] = set()

    def size(root: Message) -> int:
        total = 0
        for part in _graphs(root):
            for node in part.get("nodes", []):
                total += 1
                called = _called(node, "op_type")
                if called in bodies:
                    total += of_function(called)
        return min(total, MAX_NODES + 1)

    def of_function(called: Called) -> int:
        if called in under_way or len(under_way) > MAX_CALLS:
            raise ArtifactError(f"function {called[1]!r:.80} calls itself, or calls are too deep")
        if called not in sizes:
            under_way.add(called)
            sizes[called] = size(bodies[called])
            under_way.discard(called)
        return sizes[called]

    if size(graph) > MAX_NODES:
        raise ArtifactError(f"more than {MAX_NODES} nodes, functions counted at every call")


def _graphs(root: Message) -> Iterator[Message]:
    """Yield a graph or function and those inside it; the reader bounds the depth."""
    yield root
    for attribute in _attributes(root):
        inner = attribute.get("graphs", [])
        for graph in [attribute["graph"], *inner] if "graph" in attribute else inner:
            yield from _graphs(graph)


def _attributes(part: Message) -> Iterator[Message]:
    yield from part.get("attributes", [])  # a function's own
    for node in part.get("nodes", []):
        yield from node.get("attributes", [])


def _tensors(part: Message) -> Iterator[Message]:
    """Yield every tensor of one graph, without those of its subgraphs."""
    yield from part.get("initializers", [])
    sparse = list(part.get("sparse_initializers", []))
    for attribute in _attributes(part):
        yield from attribute.get("tensors", [])
        if "tensor" in attribute:
            yield attribute["tensor"]
        sparse += attribute.get("sparses", [])
        sparse += [attribute["sparse"]] if "sparse" in attribute else []
    for tensor in sparse:
        _element_count(tensor, "a sparse tensor")
        for name in ("values", "indices"):
            if name not in tensor:
                raise ArtifactError(f"a sparse tensor without {name}")
            yield tensor[name]


def _names(graph: Message, which: str) -> list[str]:
    return [value.get("name", "") for value in graph.get(which, [])]


def _initializer_names(graph: Message) -> set[str]:
    names = Counter(_names(graph, "initializers"))
    if "" in names or any(count > 1 for count in names.values()):
        raise ArtifactError(f"initializers without a name or of one name: {names.most_common(1)}")
    return set(names)


def _op_type(node: Message) -> str:
    domain, op_type = node.get("domain", ""), node.get("op_type", "")
    if not op_type:
        raise ArtifactError("a node without op_type")
    return op_type if domain in ("", "ai.onnx") else f"{domain}.{op_type}"


def _element_count(tensor: Message, what: str) -> int:
    dims = tensor.get("dims", [])
    if len(dims) > MAX_RANK:  # before they are multiplied
        raise ArtifactError(f"{what}: {len(dims)} dimensions, at most {MAX_RANK}")
    # an empty tensor's other dimensions count too: parsers multiply them
    if any(d < 0 for d in dims) or math.prod(max(d, 1) for d in dims) >= MAX_ELEMENTS:
        raise ArtifactError(f"{what}: dims {dims[:8]} are negative or of 2^48 elements and more")
    return math.prod(dims)


def _check_tensor(tensor: Message, files: Mapping[str, int]) -> set[tuple[str, int, int]]:
    """Check one tensor; the range of another file that it is, if it is one."""
    what = f"tensor {tensor.get('name', '')!r}"
    count, data_type = _element_count(tensor, what), tensor.get("data_type", 0)
    location, entries = tensor.get("data_location", 0), tensor.get("external_data", [])
    if data_type != STRING and data_type not in BITS:
        raise ArtifactError(f"{what}: unknown data type {data_type}")
    if location not in (0, 1) or (location == 0) == bool(entries) or "segment" in tensor:
        raise ArtifactError(f"{what}: unclear whether its data lie inside or outside the file")
    nbytes = -(-count * BITS.get(data_type, 0) // 8)
    held = {name: tensor[name] for name in VALUES if tensor.get(name)}
    held |= {n: len(tensor[n]) for n in ("raw_data", "string_data") if tensor.get(n)}
    if location == 1:
        if held or data_type == STRING:
            raise ArtifactError(f"{what}: data both inside and outside the file, or strings")
        return {_external_range(what, entries, nbytes, files)}
    expected = {"raw_data": nbytes} if "raw_data" in held else _listed(data_type, count)
    if held != expected:
        raise ArtifactError(f"{what}: its dims and type ask for {expected}, it has {held}")
    return set()


def _listed(data_type: int, count: int) -> dict[str, int]:
    """Name the list that holds the values one by one, and its length."""
    name, each = ("string_data", 1) if data_type == STRING else LISTS.get(data_type, ("", 1))
    if not name and BITS[data_type] in (2, 4):
        count = -(-count * BITS[data_type] // 8)  # several to an entry, as in a byte
    return {name or "int32_data": count * each} if count else {}


def _external_range(
    what: str, entries: list[Message], nbytes: int, files: Mapping[str, int]
) -> tuple[str, int, int]:
    """Return (location, offset, length) of a tensor in another file."""
    given = {entry.get("key", ""): entry.get("value", "") for entry in entries}
    if len(given) != len(entries) or not {"location", "length"} <= set(given) <= set(EXTERNAL_KEYS):
        keys = [entry.get("key", "") for entry in entries][:8]
        raise ArtifactError(
            f"{what}: external data need location and length, each key once, and may have "
            f"offset and checksum; found {keys}"
        )
    location, numbers = given["location"], (given.get("offset", "0"), given["length"])
    if re.search(r"[/\\\0]", location) or location not in files:
        raise ArtifactError(f"{what}: {location!r} is not the plain name of a listed file")
    if not all(re.fullmatch(r"[0-9]{1,19}", number) for number in numbers):
        raise ArtifactError(f"{what}: offset and length must be whole numbers, found {numbers}")
    offset, length = map(int, numbers)
    if length != nbytes:
        raise ArtifactError(f"{what}: its dims and type ask for {nbytes} bytes, length is {length}")
    if offset + length > files[location]:
        raise ArtifactError(
            f"{what}: bytes {offset} to {offset + length} of {location}, which has "
            f"{files[location]}"
        )
    return location, offset, length


def _check_overlap(ranges: set[tuple[str, int, int]]) -> None:
    """Refuse tensors that share some of their bytes; they may share all."""
    ordered = sorted(r for r in ranges if r[2])
    for (location, start, length), (other, offset, _) in pairwise(ordered):
        if location == other and offset < start + length:
            raise ArtifactError(f"tensors overlap in {location} at byte {offset}")
