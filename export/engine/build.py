"""Engines: an ONNX component through the builder of TensorRT-RTX or TensorRT.

The two builders share one Python interface under two module names, so there is one code path; the
module is passed in, and ``targets`` knows what differs.

Precision is in the graph. The network is strongly typed, so the builder picks no types: it
fuses explicit Q/DQ pairs and refuses types that disagree. TF32 is off, so that float32 products
are float32.

Memory: the parser maps the weights from their file, and the plan leaves the builder in pieces of
some 64 MB that go straight to disk.

Attention. A layer without a fused kernel fails the build unless it may be decomposed into MatMul,
Softmax and MatMul (``decomposed``). Only layers outside of what a target fuses (``targets``) are
marked so, and a lost fusion cannot pass unseen. A build that fails with fused layers left is
repeated with every layer decomposable, whatever it said, unless memory or too old a GPU is the
reason: builders word it differently. The sidecar counts both kinds. Where that fails too, caches
that are written where they lie are written apart (``unaliased``).

Layers. What the builder made of the graph is in its log (``layers``) and goes into the sidecar. Who
expects fused layers gets no engine that has lost some (``require_fused``).
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from internvl_edge._version import __version__
from internvl_edge.artifact import EngineRecord, FileRecord, TensorSpec
from internvl_edge.artifact.sidecar import EngineInfo, Range, ShapeRanges, read_engine_info
from internvl_edge.errors import (
    ArtifactError,
    BuildError,
    HardwareError,
    InternVLError,
    ResourceError,
)
from internvl_edge.export.engine.decomposed import decomposable
from internvl_edge.export.engine.layers import LayerLog, require_fused
from internvl_edge.export.engine.monitor import Monitor
from internvl_edge.export.engine.targets import (
    Target,
    choose_capabilities,
    find_target,
    minimum_sm,
)
from internvl_edge.export.precision import precision_of
from internvl_edge.files.disk import StreamedFile, os_errors
from internvl_edge.files.signals import interrupts_held
from internvl_edge.runtime.generation.fixed_cache import WRITE_INDICES
from internvl_edge.runtime.trt.vendor import (
    DTYPES,
    NativeLog,
    callback,
    decisive_lines,
    import_tensorrt,
)

__all__ = ["BuiltEngine", "ShapeRanges", "build_engine"]

Prepare = Callable[[Path], AbstractContextManager[Path]]
ReportPhase = Callable[[str, int, int], None]  # phase, steps done, steps

IN_8_BITS = 0.8  # the least share of quantized activations that products in 8 bits read
ATTENTION_SUFFIX = "_AttentionInput"  # which the parser appends to an Attention node's name


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """An engine in a directory, and its files as they were written."""

    record: EngineRecord
    files: Mapping[str, FileRecord] = field(default_factory=dict)  # none if it was there before


def build_engine(
    onnx_path: Path,
    out_dir: Path,
    *,
    component: str,
    target: str = "tensorrt-rtx",
    profile: ShapeRanges,
    precision: str,
    inputs: Sequence[TensorSpec],
    onnx_sha256: str,
    compute_capabilities: Sequence[str] | None = None,
    known: Container[str] = (),
    prepared: Prepare = nullcontext,
    base: str = "fp32",
    expect_fused: bool = False,
    progress: ReportPhase | None = None,
    trt: Any = None,
) -> BuiltEngine:
    """Build one component's engine into ``out_dir``, with its sidecar next to it.

    Args:
        onnx_path: the graph; its external data is found relative to it.
        out_dir: the ``engines`` directory of an artifact.
        component: its name.
        target: a name in ``TARGETS``.
        profile: sizes of the symbolic dimensions.
        precision: the artifact's; decides which GPUs can run the engine.
        inputs: the component's contract, which the graph must keep.
        onnx_sha256: identifies the graph and its weights.
        compute_capabilities: as ``("SM89", "SM120")``; None: every GPU that the target reaches.
        known: files of the directory; an engine among them is not built again.
        prepared: makes of the graph, for as long as the build takes, the one that is parsed.
        base: what the graph computes in where the precision quantizes another tower alone.
        expect_fused: refuse an engine that lost fused attention or 8-bit products.
        progress: told (phase, steps done, steps); raising stops the build and comes back.
        trt: the builder's module; None imports the target's.

    Returns:
        The engine and its sidecar, relative to the parent of ``out_dir``; what was built has
        been hashed while it was written, and need not be read again.

    Raises:
        UsageError: unknown target, compute capability or symbolic dimension.
        MissingDependency: the builder is not installed.
        HardwareError: a GPU is missing, or one asked for cannot run this precision.
        ArtifactError: no such graph, or one with other inputs.
        BuildError: the builder refused the graph; its own words are in the message. Or it lost
            what it was expected to fuse.
        ResourceError: memory or disk did not suffice; no partial engine is left.
    """
    chosen = find_target(target)
    if not onnx_path.is_file():
        raise ArtifactError(f"{onnx_path}: expected the ONNX graph of {component}, found no file")
    ranges = [  # errors before work
        {spec.name: _ranges(spec, one) for spec in inputs} for one in _profiles(inputs, profile)
    ]
    trt = import_tensorrt(chosen.name) if trt is None else trt
    capabilities = choose_capabilities(trt, chosen, precision, compute_capabilities)
    key = _key(target, trt.__version__, __version__, onnx_sha256, precision, ranges, capabilities)
    stem = f"{component}.{target}-{key}"
    record = EngineRecord(
        component=component,
        target=target,
        file=f"{out_dir.name}/{stem}.plan",
        sidecar=f"{out_dir.name}/{stem}.json",
    )
    if record.file in known and record.sidecar in known:
        if expect_fused:
            kept = read_engine_info(out_dir / f"{stem}.json")
            require_fused(component, kept.census)
        return BuiltEngine(record=record)

    started = time.monotonic()
    log = _Log()
    with ExitStack() as stack:
        with os_errors(onnx_path.parent):
            graph = stack.enter_context(prepared(onnx_path))
        signals = stack.enter_context(interrupts_held())  # which a builder's callback would lose
        network = _parse(trt, chosen, component, graph, log)
        _check_inputs(network, component, inputs)
        fused, others = _attentions(trt, chosen, network.definition)
        expected, error, decomposed = len(fused), None, others
        with StreamedFile(out_dir / f"{stem}.plan") as plan:
            monitor = Monitor(progress or _silent, signals)
            for decomposed, prepare in _attempts(fused, others, inputs):
                if decomposed or prepare is not nullcontext:
                    del network
                    source = stack.enter_context(prepare(graph))
                    network = _parse(trt, chosen, component, source, log, decomposed)
                config = _configure(trt, chosen, network, ranges, capabilities)
                error = _build(trt, network, config, plan, log, component, monitor)
                if type(error) is not BuildError or plan.nbytes:
                    break
            if error is not None:
                raise error
            own = precision_of(precision, component)
            census = log.layers.census(
                base if own == "fp32" else own,
                expected_attention=expected * len(ranges),  # a builder lists each profile
                expected_8_bit=_expected_8_bit(trt, network.definition) * len(ranges),
            )
            if expect_fused:
                require_fused(component, census)
            if signals:
                raise BuildError(f"{component}: interrupted")  # the signal's own error follows
            plan.publish()
        outputs = _outputs(network)
        del network, config  # which read what was prepared
    info = EngineInfo(
        component=component,
        target=target,
        precision=precision,
        builder_version=str(trt.__version__),
        tool_version=__version__,
        compute_capabilities=capabilities,
        minimum_sm=minimum_sm(precision, capabilities),
        profile=profile,
        onnx_sha256=onnx_sha256,
        nbytes=plan.nbytes,
        sha256=plan.sha256,
        fused_attention=expected - len(decomposed & fused),
        decomposed_attention=len(decomposed),
        build_seconds=round(max(0.0, time.monotonic() - started), 3),
        inputs=tuple(inputs),
        outputs=outputs,
        census=census,
    )
    with StreamedFile(out_dir / f"{stem}.json") as sidecar:
        sidecar.write((json.dumps(info.to_json(), indent=2) + "\n").encode())
        sidecar.publish()
    written = {record.file: plan, record.sidecar: sidecar}
    files = {n: FileRecord(nbytes=f.nbytes, sha256=f.sha256) for n, f in written.items()}
    return BuiltEngine(record=record, files=files)


def _profiles(inputs: Sequence[TensorSpec], profile: ShapeRanges) -> list[ShapeRanges]:
    """List the profiles of an engine: one with a cache has another, tuned for single tokens."""
    has_cache = any("past" in spec.shape or spec.name == WRITE_INDICES for spec in inputs)
    return [profile, replace(profile, length=(1, 1, 1))] if has_cache else [profile]


def _ranges(spec: TensorSpec, profile: ShapeRanges) -> list[Range]:
    """Give the smallest, typical and largest size of each dimension of an input."""
    return [(n, n, n) if isinstance(n, int) else profile.range_of(n) for n in spec.shape]


def _key(*parts: object) -> str:
    """Hash everything that decides what the engine is."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


# --- the builder -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Network:
    """A parsed graph, and what must last as long: the parser owns the mapped weights."""

    definition: Any
    builder: Any
    parser: Any
    logger: Any


class _Log(NativeLog):
    """A builder's log: its last errors, and the layers of what it built."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = LayerLog()

    def log(self, severity: Any, message: str) -> None:
        super().log(severity, message)
        self.layers.take(message)


def _parse(
    trt: Any,
    target: Target,
    component: str,
    path: Path,
    log: NativeLog,
    decomposed: Container[str] = (),
) -> _Network:
    """Parse a graph; the named attention nodes may be decomposed."""
    logger = callback(trt.ILogger, log=log.log)
    try:
        builder = trt.Builder(logger)
    except (TypeError, RuntimeError) as error:  # the factory gave no builder
        raise HardwareError(
            f"{target.name} cannot start a builder: {log.decisive() or error}"
        ) from error
    flags = trt.NetworkDefinitionCreationFlag.__members__
    typed = 1 << int(flags["STRONGLY_TYPED"]) if "STRONGLY_TYPED" in flags else 0
    definition = builder.create_network(typed)
    parser = trt.OnnxParser(definition, logger)
    if decomposed:
        is_parsed = parser.parse(decomposable(path.read_bytes(), decomposed), str(path))
    else:
        is_parsed = parser.parse_from_file(str(path))
    if not is_parsed or parser.num_errors:
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        told = (
            "\n  ".join(map(_parser_error, errors[:3])) or log.decisive() or "it does not say why"
        )
        raise BuildError(f"{target.name} cannot parse {component} ({path}):\n  {told}")
    if definition.num_outputs == 0:
        raise BuildError(f"{target.name} found no outputs in {path}: is it an ONNX model?")
    return _Network(definition=definition, builder=builder, parser=parser, logger=logger)


def _parser_error(error: Any) -> str:
    """Say which node of the graph failed, and why."""
    code = str(error.code()).removeprefix("ErrorCode.")
    reason = decisive_lines([error.desc()])
    if code == "UNSUPPORTED_NODE" and reason in ("", "false"):
        reason = "the operator is not supported in this form"
    operator = error.node_operator()
    where = f"{operator} node {error.node_name() or error.node()!r}: " if operator else ""
    return f"{where}{code}: {reason}"


def _check_inputs(network: _Network, component: str, specs: Sequence[TensorSpec]) -> None:
    """Refuse a graph whose inputs are not the manifest's: its profile is of those."""
    definition = network.definition
    tensors = [definition.get_input(index) for index in range(definition.num_inputs)]
    given = sorted((t.name, DTYPES.get(t.dtype.name), tuple(t.shape)) for t in tensors)
    expected = sorted(
        (s.name, s.dtype, tuple(n if isinstance(n, int) else -1 for n in s.shape)) for s in specs
    )
    if given != expected:
        raise ArtifactError(f"{component}: expected inputs {expected}, the graph has {given}")


def _outputs(network: _Network) -> tuple[TensorSpec, ...]:
    """List the engine's outputs; a graph names of their symbolic dimensions only the first."""
    definition = network.definition
    tensors = [definition.get_output(index) for index in range(definition.num_outputs)]
    return tuple(
        TensorSpec(
            name=tensor.name,
            dtype=DTYPES.get(tensor.dtype.name, tensor.dtype.name.lower()),
            shape=tuple(
                int(n) if n >= 0 else "batch" if axis == 0 else f"axis_{axis}"
                for axis, n in enumerate(tensor.shape)
            ),
        )
        for tensor in tensors
    )


def _configure(
    trt: Any,
    target: Target,
    network: _Network,
    ranges: Sequence[dict[str, list[Range]]],
    capabilities: Sequence[str],
) -> Any:
    config = network.builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # lists layers in the log
    if target.portable and capabilities:
        config.num_compute_capabilities = len(capabilities)
        for index, name in enumerate(capabilities):
            if not config.set_compute_capability(trt.ComputeCapability.__members__[name], index):
                raise HardwareError(f"{target.name} {trt.__version__} refuses to build for {name}")
    for shapes in ranges:
        profile = network.builder.create_optimization_profile()
        for name, sizes in shapes.items():
            low, typical, high = zip(*sizes, strict=True)
            profile.set_shape(name, low, typical, high)
        config.add_optimization_profile(profile)
    return config


def _build(
    trt: Any,
    network: _Network,
    config: Any,
    plan: StreamedFile,
    log: NativeLog,
    component: str,
    monitor: Monitor,
) -> InternVLError | None:
    """Stream the engine into ``plan``; return why there is none, or None."""
    config.progress_monitor = callback(
        trt.IProgressMonitor,
        phase_start=monitor.phase_start,
        step_complete=monitor.step_complete,
        phase_finish=monitor.phase_finish,
    )
    writer = callback(
        trt.IStreamWriter, write=lambda data: 0 if monitor.is_stopped else plan.write(data)
    )
    built = network.builder.build_serialized_network_to_stream(network.definition, config, writer)
    if monitor.stopped_by is not None:
        raise monitor.stopped_by
    if not built and plan.error is None:
        return _failure(component, log)
    if plan.error is None and plan.nbytes == 0:
        return BuildError(f"{component}: the builder reported success and wrote nothing")
    return None


def _silent(phase: str, done: int, total: int) -> None:
    pass


def _attempts(
    fused: set[str], others: set[str], inputs: Sequence[TensorSpec]
) -> Iterator[tuple[set[str], Prepare]]:
    """Yield what to try until a build succeeds: attention to decompose, and a change of the graph.

    First what is fastest, then with every attention decomposed, then with caches written apart.
    TensorRT-RTX 1.7 builds those where attention may be decomposed, and fuses it all the same.
    """
    yield others, nullcontext
    if fused:
        yield fused | others, nullcontext
    is_in_place = any(spec.name == WRITE_INDICES for spec in inputs)
    if is_in_place and find_spec("onnx_ir") is not None:
        from internvl_edge.export.engine.unaliased import unaliased_graph

        yield others, unaliased_graph
        if fused:
            yield fused | others, unaliased_graph


def _attentions(trt: Any, target: Target, definition: Any) -> tuple[set[str], set[str]]:
    """List the attention nodes that the target has a fused kernel for, and the others."""
    fused, others = set[str](), set[str]()
    for index in range(definition.num_layers):
        layer = definition.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            query = layer.get_input(0)
            *_, length, head_size = query.shape  # of queries (B, heads, T, d)
            has_kernel = target.has_fused_kernel(query.dtype.name, length, head_size)
            (fused if has_kernel else others).add(layer.name.removesuffix(ATTENTION_SUFFIX))
    return fused, others


def _expected_8_bit(trt: Any, definition: Any) -> int:
    """Count the products that should be in 8 bits: at least one reads each quantized activation.

    But for those that read constants alone, which are computed once: query tokens in the first
    layer. Those inside of a quantized attention are one kernel with it, and not counted.
    """
    kinds = [definition.get_layer(index).type for index in range(definition.num_layers)]
    pairs = kinds.count(trt.LayerType.QUANTIZE)
    return min(pairs, 1) if trt.LayerType.SOFTMAX in kinds else math.ceil(IN_8_BITS * pairs)


def _failure(component: str, log: NativeLog) -> InternVLError:
    """Make the error of a build that gave no engine, from what the builder logged."""
    told = log.decisive() or "the builder logged no reason"
    if log.mentions("OutOfMemory") or log.mentions("bad_alloc"):
        return ResourceError(f"{component}: not enough memory to build the engine:\n  {told}")
    if log.mentions("Cannot compile"):
        return HardwareError(f"{component}: the graph needs newer GPUs than asked for:\n  {told}")
    return BuildError(f"{component}: no engine was built:\n  {told}")
