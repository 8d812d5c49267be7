"""An estimate of what a component takes on a GPU that is not there, from its graph's shapes.

A graph becomes kernels: each product, each attention, and what lies between them. Where a builder
or a graph for CUDA fuses, additions, factors and the norm after them are one kernel. Then

    product     max(operations / (0.76 · peak), bytes / (0.9 · bandwidth)) + 3 µs
                + 11 µs · min(1, bytes / 20 MB)
    attention   operations / (0.13 · peak of 16 bits) + 9 µs
    others      bytes / (0.4 · bandwidth) + 2 µs

Peaks and bandwidths are the vendor's, dense. The shares and times were fitted on one H200, to the
kernels of InternViT-6B's blocks in bfloat16 that a profiler listed, at batches of 1, 8 and 32; for
other GPUs they are assumed. What the host does and copies is not in it. It is an estimate, within
15 % of the rows that it is held against (``tests/benchmark/test_forecast.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from internvl_edge.artifact import Artifact
from internvl_edge.artifact.components import cuda_graph
from internvl_edge.benchmark.inputs import seeded_feeds
from internvl_edge.benchmark.limits.workload import CONVERSIONS, COUNTS, Graph, Shapes, read_graph
from internvl_edge.benchmark.settings import Settings
from internvl_edge.compiler.steps.graph_files import graph_file
from internvl_edge.errors import UsageError
from internvl_edge.runtime.session import runs_engines

__all__ = [
    "COLUMNS",
    "GPUS",
    "Estimate",
    "ForecastRow",
    "Gpu",
    "Kernel",
    "estimate",
    "find_gpu",
    "forecast_component",
    "read_kernels",
    "run_forecast",
]

Kind = Literal["product", "attention", "other"]
PRODUCT_SHARE, PRODUCT_BANDWIDTH, PRODUCT_S = 0.76, 0.9, 3e-6
RAMP_S, RAMP_NBYTES = 11e-6, 20e6  # to fill and drain the machine; a small product does not
ATTENTION_SHARE, ATTENTION_S = 0.13, 9e-6
OTHER_BANDWIDTH, OTHER_S = 0.4, 2e-6
ELEMENTWISE = {"Add", "Mul", "Sub", "Div", "Cast", "Gelu", "Sigmoid", "Swish", "Neg", "Where"}
NORMS = {"RMSNormalization", "LayerNormalization"}
# Views, shapes, and pairs, which are part of the kernels next to them.
FREE = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Shape", "Constant", "Expand"}
FREE |= {"QuantizeLinear", "DequantizeLinear"}
PARTS = {"Slice", "Split"}  # of one value: one kernel
FLOATS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """What a data sheet says of a GPU, without sparsity."""

    name: str
    operations: Mapping[str, float]  # a second, by type; types that do not run there are missing
    bandwidth: float  # bytes a second


def _gpu(name: str, float32: float, half: float, int8: float, fp8: float, bandwidth: float) -> Gpu:
    peaks = {"float32": float32, "float16": half, "bfloat16": half, "int8": int8, "float8": fp8}
    operations = {kind: 1e12 * peak for kind, peak in peaks.items() if peak}
    return Gpu(name=name, operations=operations, bandwidth=1e9 * bandwidth)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("h100", 67, 989, 1979, 1979, 3350),
        _gpu("h200", 67, 989, 1979, 1979, 4800),
        _gpu("l40s", 91.6, 362, 733, 733, 864),
        _gpu("rtx4090", 82.6, 165, 661, 330, 1008),
        _gpu("orin", 5.3, 42.5, 85, 0, 204.8),
    )
}


def find_gpu(name: str) -> Gpu:
    """Find a GPU that forecasts know.

    Raises:
        UsageError: they do not.
    """
    if name not in GPUS:
        raise UsageError(f"--forecast-gpu: expected one of {', '.join(GPUS)}, found {name!r}")
    return GPUS[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One launch."""

    kind: Kind
    type: str  # what it computes in
    operations: int
    nbytes: int  # read and written


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a call of a component takes on a GPU, by kind of kernel."""

    gpu: str
    product_ms: float
    attention_ms: float
    other_ms: float
    roof_ms: float  # the least that peak and bandwidth allow the products
    launches: int

    @property
    def latency_ms(self) -> float:
        return self.product_ms + self.attention_ms + self.other_ms


def estimate(kernels: Sequence[Kernel], gpu: Gpu) -> Estimate:
    """Estimate the kernels' time on a GPU.

    Raises:
        UsageError: the GPU does not compute in a type of the products.
    """
    ms = {
        kind: 1e3 * sum(_seconds(k, gpu) for k in kernels if k.kind == kind)
        for kind in ("product", "attention", "other")
    }
    products = [kernel for kernel in kernels if kernel.kind == "product"]
    roofs = (max(k.operations / _peak(gpu, k.type), k.nbytes / gpu.bandwidth) for k in products)
    return Estimate(
        gpu=gpu.name,
        product_ms=ms["product"],
        attention_ms=ms["attention"],
        other_ms=ms["other"],
        roof_ms=1e3 * sum(roofs),
        launches=len(kernels),
    )


def _seconds(kernel: Kernel, gpu: Gpu) -> float:
    if kernel.kind == "product":
        computing = kernel.operations / (PRODUCT_SHARE * _peak(gpu, kernel.type))
        moving = kernel.nbytes / (PRODUCT_BANDWIDTH * gpu.bandwidth)
        ramp = RAMP_S * min(1.0, kernel.nbytes / RAMP_NBYTES)
        return max(computing, moving) + PRODUCT_S + ramp
    if kernel.kind == "attention":
        kind = "float32" if kernel.type == "float32" else "bfloat16"
        return kernel.operations / (ATTENTION_SHARE * _peak(gpu, kind)) + ATTENTION_S
    return kernel.nbytes / (OTHER_BANDWIDTH * gpu.bandwidth) + OTHER_S


def _peak(gpu: Gpu, kind: str) -> float:
    if kind not in gpu.operations:
        raise UsageError(
            f"--forecast-gpu {gpu.name}: it does not compute in {kind}; choose a directory in "
            f"{', '.join(gpu.operations)}"
        )
    return gpu.operations[kind]


# --- components ----------------------------------------------------------------------------------

COLUMNS = ("component", "batch", "estimate", "products", "attention", "others", "kernels", "roof")


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastRow:
    """The estimate of a component at a batch size."""

    out: str
    component: str
    batch_size: int
    estimate: Estimate

    def texts(self) -> tuple[str, ...]:
        """Arrange it under ``COLUMNS``."""
        e = self.estimate
        times = (e.latency_ms, e.product_ms, e.attention_ms, e.other_ms)
        texts = tuple(f"{ms:.3g} ms" for ms in times)
        return (
            self.component,
            str(self.batch_size),
            *texts,
            str(e.launches),
            f"{e.roof_ms:.3g} ms",
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "out": self.out,
            "component": self.component,
            "batch_size": self.batch_size,
            "is_estimate": True,
            "latency_ms": self.estimate.latency_ms,
            **asdict(self.estimate),
        }


def run_forecast(settings: Settings, gpu: str) -> list[ForecastRow]:
    """Estimate every component at every batch size on a GPU that is not there; nothing is run.

    Raises:
        UsageError: a GPU that is not known, or does not compute in a type of a component.
    """
    rows, chosen = [], find_gpu(gpu)
    for out, artifact in settings.artifacts.items():
        for component in settings.components:
            for batch in settings.batch_sizes:
                feeds = seeded_feeds(artifact, component, batch)
                shapes = {name: array.shape for name, array in feeds.items()}
                found = forecast_component(artifact, component, shapes, chosen, settings.backend)
                rows.append(
                    ForecastRow(out=out, component=component, batch_size=batch, estimate=found)
                )
    return rows


def forecast_component(
    artifact: Artifact, component: str, shapes: Shapes, gpu: Gpu, backend: str
) -> Estimate:
    """Estimate a call of a component on a GPU, from the graph that would run there.

    Raises:
        UsageError: the GPU does not compute in a type of it.
        ArtifactError: shapes do not follow from those of the inputs.
    """
    manifest, is_fused = artifact.manifest, True
    file = graph_file(manifest, component)
    if not runs_engines(backend):
        file = manifest.components[component].file
        is_fused = cuda_graph(component) in manifest.files
    return estimate(read_kernels(artifact.file(file), shapes, is_fused=is_fused), gpu)


# --- kernels of a graph --------------------------------------------------------------------------


def read_kernels(path: Path, shapes: Shapes, *, is_fused: bool) -> list[Kernel]:
    """List the kernels that a graph becomes.

    Args:
        path: the ONNX file; its external data need not be there.
        shapes: of its inputs.
        is_fused: additions and the norm after them are one kernel, as engines and graphs for CUDA
            have them; else each is one, but a bias with its GELU, as ONNX Runtime does by itself.
    """
    proto, graph = read_graph(path, shapes)
    readers = Counter(name for node in proto.node for name in node.input)
    readers.update(value.name for value in proto.output)
    nodes = [node for node in proto.node if _is_kernel(node, graph)]
    groups = _groups(nodes, readers, is_fused=is_fused)
    return [_kernel(group, graph, readers) for group in groups]


def _kernel(group: Sequence[Any], graph: Graph, readers: Mapping[str, int]) -> Kernel:
    """Count what a group of nodes reads, writes and computes."""
    reads = Counter(name for node in group for name in node.input if name)
    made = {name for node in group for name in node.output if name}
    written = {name for name in made if readers[name] > reads[name]}
    read = {_held(graph, name) for name in reads if name not in made}
    first = group[0]
    count = COUNTS.get(first.op_type)
    kind: Kind = "other"
    if count is not None:
        kind = "attention" if first.op_type == "Attention" else "product"
    return Kernel(
        kind=kind,
        type=graph.product_type(first.input[:2]) if count else "",
        operations=count(graph, first) if count else 0,
        nbytes=sum(map(graph.nbytes, read | written)),
    )


def _held(graph: Graph, name: str) -> str:
    """Find what a kernel reads where it dequantizes or converts on the way: as it is in memory."""
    while (node := graph.producer(name)) is not None:
        is_converted = node.op_type in CONVERSIONS and graph.is_stored(name)
        if node.op_type != "DequantizeLinear" and not is_converted:
            break
        name = node.input[0]
    return name


def _is_kernel(node: Any, graph: Graph) -> bool:
    """Tell whether a node computes from inputs of the graph, and more than a shape."""
    if node.op_type in FREE or all(graph.is_stored(name) for name in node.input if name):
        return False
    return any(graph.type_name(name) in FLOATS for name in node.output if name)


def _groups(nodes: Sequence[Any], readers: Mapping[str, int], *, is_fused: bool) -> list[list[Any]]:
    """Group the nodes that are one kernel."""
    groups: list[list[Any]] = []
    made_by: dict[str, list[Any]] = {}  # outputs of elementwise kernels
    parts: dict[str, list[Any]] = {}
    for node in nodes:
        joined = parts.get(node.input[0]) if node.op_type in PARTS else None
        for name in () if joined is not None else node.input:
            before = made_by.get(name)
            if before is not None and _joins(node, before, readers, is_fused=is_fused):
                joined = before
                break
        group = [] if joined is None else joined
        group.append(node)
        if joined is None:
            groups.append(group)
        if node.op_type in PARTS:
            parts[node.input[0]] = group
        if node.op_type in ELEMENTWISE:
            made_by |= dict.fromkeys(node.output, group)
    return groups


def _joins(node: Any, before: Sequence[Any], readers: Mapping[str, int], *, is_fused: bool) -> bool:
    """Tell whether a node is part of the kernel whose last node makes one of its inputs."""
    last = before[-1]
    if last.output[0] not in node.input:
        return False
    if not is_fused:
        return bool(node.op_type == "Gelu" and last.op_type == "Add")
    is_only = readers[last.output[0]] == 1
    return node.op_type in NORMS or (node.op_type in ELEMENTWISE and is_only)
