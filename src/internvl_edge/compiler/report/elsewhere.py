"""Which of a directory's graphs a program opens that has no runtime of ours, and with what.

Every program can read ONNX; not every one computes these graphs rightly. Opened with ONNX Runtime's
defaults on the CPU (measured with releases 1.23.2 to 1.32.0; docs/howto/interoperate.md):

    int8           QuantizeLinear of opset 23 has kernels from 1.24.1 on. On an x86 processor
                   without VNNI sums of signed products saturate, and outputs are off without an
                   error: there it is the graph with unsigned weights, which is right on all
    fp8            the same, and up to 1.31 one optimizer makes INT8 products of the FP8 ones, which
                   the next step refuses
    a cache that   TensorScatter has a kernel from 1.25.0 on
    stays in place
    bf16           the CPU has no kernels
    *.fp16.onnx,   of quantized components: what engines are built from. Of INT8 and FP8 products
    *.bf16.onnx    ONNX Runtime's CPU provider opens none
    *.cuda.onnx    operators of ONNX Runtime's CUDA provider
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from internvl_edge.artifact.components import (
    EMBEDDERS,
    JOINED_GRAPH,
    cpu_graph,
    cuda_graph,
    engine_graph,
    find_component,
    unsigned_graph,
)
from internvl_edge.artifact.manifest import Manifest
from internvl_edge.export.precision import precision_of
from internvl_edge.runtime.feeds import WRITE_INDICES

__all__ = ["Opener", "openers"]

BASES = ("fp16", "bf16")  # of graphs for engines

# Releases of ONNX Runtime, the oldest that opens graphs of a kind
OLDEST, OLDEST_INT8, OLDEST_IN_PLACE, OLDEST_FP8 = "1.23.2", "1.24.1", "1.25.0", "1.32.0"
UNFUSED = 'disabled_optimizers=["QDQSelectorActionTransformer"]'
ANY = "any processor"
RIGHT_ON_ALL = "any processor; on x86 without VNNI or AMX take no other"
WITH_VNNI = "processors with VNNI or AMX, and Arm; on other x86 wrong without an error"
NO_CPU = "NVIDIA GPUs; the CPU has no bfloat16"
ENGINES = ("TensorRT", "internvl-edge build")
CUDA = ("ONNX Runtime's CUDA provider", "NVIDIA GPUs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Opener:
    """Graphs that open alike."""

    files: tuple[str, ...]
    program: str  # and its releases
    place: str  # what computes them


def openers(manifest: Manifest) -> tuple[Opener, ...]:
    """List the graphs of a directory by what opens them, those for any processor first."""
    found: dict[tuple[str, str], list[str]] = {}
    for file, how in _graphs(manifest):
        if file in manifest.files:
            found.setdefault(how, []).append(file)
    first = sorted(found.items(), key=lambda row: not row[0][1].startswith(ANY))
    return tuple(
        Opener(files=tuple(files), program=program, place=place)
        for (program, place), files in first
    )


def _graphs(manifest: Manifest) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield every graph that there may be, with program and place."""
    joined: list[tuple[str, str]] = []
    for name, record in manifest.components.items():
        own, unsigned = _own(manifest, name), unsigned_graph(name)
        if unsigned in manifest.files:
            yield unsigned, (own[0], RIGHT_ON_ALL)
        yield record.file, own
        yield cpu_graph(name), own
        for base in BASES:
            yield engine_graph(name, base), ENGINES
        yield cuda_graph(name), CUDA
        if name in EMBEDDERS:
            place = RIGHT_ON_ALL if unsigned in manifest.files else own[1]
            joined.append((own[0], place))
    if joined:
        yield JOINED_GRAPH, max(joined)  # what the newer release opens


def _own(manifest: Manifest, component: str) -> tuple[str, str]:
    """Say what opens the graph that has a component's name."""
    precision = precision_of(manifest.precision, component)
    inputs = {spec.name for spec in manifest.components[component].inputs}
    oldest = OLDEST_IN_PLACE if WRITE_INDICES in inputs else OLDEST
    if precision == "bf16":
        return _from(oldest), NO_CPU
    has_int8 = unsigned_graph(component) in manifest.files
    has_fp8 = precision == "fp8" and find_component(component).stream is not None
    if not has_int8 and not has_fp8:
        return _from(oldest), ANY
    oldest = OLDEST_IN_PLACE if oldest == OLDEST_IN_PLACE else OLDEST_INT8
    if has_fp8:
        return f"{_from(OLDEST_FP8)}; from {oldest} on with {UNFUSED}", ANY
    return _from(oldest), WITH_VNNI


def _from(release: str) -> str:
    return f"ONNX Runtime {release} or later"
