"""Engines for a directory: built from its graphs, recorded in its manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from internvl_edge.artifact.components import COMPONENTS, find_component
from internvl_edge.artifact.open import EngineRecord, Manifest, TensorSpec
from internvl_edge.artifact.publish import record, update, write_manifest
from internvl_edge.artifact.sidecar import Range
from internvl_edge.compiler.cost import Cost, Forecast
from internvl_edge.compiler.progress import Progress, Report, silent
from internvl_edge.compiler.steps.step import Build
from internvl_edge.errors import BuildError, ResourceError, UsageError, did_you_mean
from internvl_edge.export.engine.build import Prepare, ShapeRanges, build_engine
from internvl_edge.export.engine.memory import (
    builder_nbytes,
    joined_nbytes,
    require_memory_to_build,
)
from internvl_edge.export.engine.targets import choose_capabilities, find_target
from internvl_edge.files.disk import link_or_copy
from internvl_edge.runtime.generation.fixed_cache import capacity_of
from internvl_edge.runtime.trt.vendor import import_tensorrt

if TYPE_CHECKING:  # it needs PyTorch, and building engines does not
    from internvl_edge.compiler.plan import Plan

ENGINES = "engines"
BUILDER_MAPPED_NBYTES = 110_000_000  # its library
BUILD_NBYTES_PER_SECOND = 290e6
JOINED_NBYTES_PER_SECOND = 800e6
BUILD_SECONDS_PER_BLOCK = 0.7
BUILD_SECONDS = 1.0
ENGINE_NBYTES = 7_000_000  # of an engine in addition to its weights: the demo's have 5 to 9 MB
IN_PLACE_BATCH = (1, 1, 4)
COMPUTE_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def require_targets(targets: Sequence[str], precision: str) -> None:
    """Make sure, before any work, that engines can be built for every target.

    Raises:
        UsageError: not a target that has engines.
        MissingDependency, HardwareError: its package, or the GPU that it builds on, is missing.
    """
    for name in targets:
        target = find_target(name)
        choose_capabilities(import_tensorrt(target.name), target, precision, None)


def engine_graph(component: str, base: str) -> str:
    """Name the graph that engines are built from, where it is not the component's own."""
    return f"{component}.{base}.onnx"


# An image's tokens and a question are read at once; a picture of twelve tiles has 3328 tokens.
CHAT_PROFILE = ShapeRanges(batch=(1, 1, 4), length=(1, 320, 3584), past=(0, 512, 4096))
# One conversation: every position of a call has logits of its own, 3584 of 64000 take 0.9 GB.
CHAT_DECODER_PROFILE = replace(CHAT_PROFILE, batch=(1, 1, 1))


def profile_from(**sizes: str) -> ShapeRanges:
    """Make a profile from texts such as ``batch="1,4,16"``: smallest, usual and largest size.

    Raises:
        UsageError: not three whole numbers in order.
    """
    return ShapeRanges(**ranges_from(**sizes))


def ranges_from(**sizes: str | None) -> dict[str, Range]:
    """Parse the ranges of those dimensions that are given; see :func:`profile_from`."""
    ranges = {}
    for name, text in sizes.items():
        if text is None:
            continue
        parts = text.split(",")
        if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
            raise UsageError(f"--{name}: expected three sizes such as 1,4,16, found {text!r}")
        ranges[name] = (int(parts[0]), int(parts[1]), int(parts[2]))
    return ranges


def profile_for(
    manifest: Manifest, component: str, asked: ShapeRanges | Mapping[str, Range] | None
) -> ShapeRanges:
    """Choose the profile of a component, no longer than the positions its model has.

    Args:
        manifest: of the directory.
        component: its name.
        asked: a profile, or ranges instead of the usual ones.

    Raises:
        UsageError: a profile that was asked for is longer.
    """
    usual, llama, known = ShapeRanges(), manifest.language_model, find_component(component)
    if manifest.model.get("chat"):
        usual = CHAT_DECODER_PROFILE if known.takes_cache else CHAT_PROFILE
    ranges = asdict(asked) if isinstance(asked, ShapeRanges) else dict(asked or {})
    if llama is None:
        return replace(usual, **ranges)
    internvl = manifest.model.get("internvl")
    queries = internvl["num_query_token"] if internvl and known.has_queries else 0
    longest = llama["max_position_embeddings"] - queries
    capacity = capacity_of({spec.name: spec for spec in manifest.components[component].inputs})
    if capacity is not None:  # a session takes memory for the whole cache of every row
        batch = min(usual.batch, IN_PLACE_BATCH)
        longest, usual = min(longest, capacity), replace(usual, batch=batch)
    length = ranges.get("length", _capped(usual.length, longest))
    if length[2] > longest:
        raise UsageError(
            f"--length: {component} has positions for {longest} tokens, asked for up to {length[2]}"
        )
    room = longest - length[0]  # a call adds one token at least
    past = ranges.get("past", usual.past)
    if past in (usual.past, ShapeRanges().past):  # not asked for
        past = _capped(past, room)
    if past[2] > room and "past" in _dimensions(manifest, [component]):
        raise UsageError(
            f"--past: {component} has {longest} positions, asked for up to {past[2]} before "
            f"{length[0]} or more new ones"
        )
    return replace(usual, **ranges | {"length": length, "past": past})


def _capped(sizes: Range, most: int) -> Range:
    low, typical, high = sizes
    return min(low, most), min(typical, most), min(high, most)


def _dimensions(manifest: Manifest, components: Collection[str]) -> set[str]:
    """Collect the dimensions of components' inputs that are decided at run time."""
    specs = [spec for name in components for spec in manifest.components[name].inputs]
    return {size for spec in specs for size in spec.shape if isinstance(size, str)}


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildEngines:
    """Build the engine of each component, one after the other, for each target."""

    targets: tuple[str, ...]
    weights: Mapping[str, int]  # component → bytes of its weights as an engine holds them
    depths: Mapping[str, int]  # component → blocks of its tower
    precision: str  # as it was asked for: one for all, or one per tower

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        targets: Sequence[str],
        components: Sequence[str] | None = None,
    ) -> BuildEngines:
        """Describe the engines of a directory, of all its components by default."""
        chosen = list(components or manifest.components)
        return cls(
            targets=tuple(targets),
            weights={name: manifest.components[name].nbytes for name in chosen},
            depths={name: _num_blocks(manifest, name) for name in chosen},
            precision=manifest.precision,
        )

    def costs(self, plan: Plan | None = None) -> tuple[Cost, ...]:
        """State what each component's engines need; a directory's have no plan any more."""
        return tuple(self._cost(component) for component in self.depths)

    def _cost(self, component: str) -> Cost:
        nbytes, depth = self.weights[component], self.depths[component]
        mapped = nbytes + BUILDER_MAPPED_NBYTES  # the graph's weights
        joined = joined_nbytes(component, nbytes, self.precision)
        taken = builder_nbytes(component, nbytes, depth, self.precision)
        seconds = BUILD_SECONDS + BUILD_SECONDS_PER_BLOCK * depth
        seconds += nbytes / BUILD_NBYTES_PER_SECOND + joined / JOINED_NBYTES_PER_SECOND
        return Cost(
            name=f"build {component}",
            memory_nbytes=mapped + taken,
            mapped_nbytes=mapped,
            disk_nbytes=(nbytes + ENGINE_NBYTES) * len(self.targets),
            scratch_nbytes=joined,
            seconds=len(self.targets) * seconds,
        )

    def run(self, plan: Plan, build: Build) -> None:
        """Build them; hours of quantization are not thrown away for one that fails."""
        assert build.manifest is not None
        try:
            for grown in add_engines(
                build.directory,
                build.manifest,
                self.targets,
                keep=build.work.engines,
                report=build.report,
            ):
                plan.checkpoint.require_unchanged()
                build.manifest = grown
        except (BuildError, ResourceError) as error:
            build.failure = error


def forecast_build(
    manifest: Manifest, targets: Sequence[str], components: Sequence[str] | None = None
) -> Forecast:
    """Forecast what building a directory's engines will need; of all components by default."""
    return Forecast(steps=BuildEngines.of(manifest, targets, components).costs())


def require_buildable(
    manifest: Manifest,
    targets: Sequence[str],
    components: Sequence[str] | None,
    profile: ShapeRanges | Mapping[str, Range] | None,
) -> None:
    """Refuse, before any work, what cannot be built.

    Raises:
        UsageError: a component that the directory does not have, a target without engines, or a
            profile that is longer than a model, or of a dimension that nothing has.
        MissingDependency, HardwareError: a target's package, or its GPU, is missing.
    """
    require_targets(targets, manifest.precision)
    known = manifest.components
    for name in components or ():
        if name not in known:
            raise UsageError(
                f"component {name!r}: the directory has {', '.join(known)}"
                f"{did_you_mean(name, known)}"
            )
    chosen = tuple(components or known)
    if not isinstance(profile, ShapeRanges):
        _require_dimensions(manifest, chosen, profile or {})
    for name in chosen:
        profile_for(manifest, name, profile)


def _require_dimensions(
    manifest: Manifest, components: Sequence[str], asked: Mapping[str, Range]
) -> None:
    """Refuse sizes of a dimension that no component has."""
    for size in sorted({*asked} - _dimensions(manifest, components)):
        is_fixed = size == "past" and any(find_component(name).takes_cache for name in components)
        why = ", as --cache-capacity fixed it when OUT was exported" if is_fixed else ""
        raise UsageError(
            f"--{size}: expected a component with that dimension, found {', '.join(components)}"
            f"{why}; leave --{size} out"
        )


def build(
    out: Path,
    targets: Sequence[str],
    *,
    components: Sequence[str] | None = None,
    profile: ShapeRanges | Mapping[str, Range] | None = None,
    report: Report = silent,
) -> list[EngineRecord]:
    """Build engines for a published directory and add them to it.

    Args:
        out: the directory.
        targets: ``tensorrt-rtx``, ``tensorrt`` or both.
        components: all of them by default.
        profile: sizes that the engines accept, or ranges of some instead of the usual ones.
        report: told before each engine.

    Raises:
        ArtifactError: the directory is not what its manifest says.
        MissingDependency: a target's package is not installed.
        ResourceError: memory or disk, before anything is built.
        BuildError: TensorRT refused a graph; what was built before stays.
    """
    with update(out) as artifact:
        require_buildable(artifact.manifest, targets, components, profile)
        forecast_build(artifact.manifest, targets, components).require_fit(out)
        manifest = artifact.manifest
        for grown in add_engines(
            out, manifest, targets, components=components, profile=profile, report=report
        ):
            write_manifest(out, grown)
            manifest = grown
    return list(manifest.engines)


def add_engines(
    directory: Path,
    manifest: Manifest,
    targets: Sequence[str],
    *,
    components: Sequence[str] | None = None,
    profile: ShapeRanges | Mapping[str, Range] | None = None,
    keep: Path | None = None,
    report: Report = silent,
) -> Iterator[Manifest]:
    """Build into ``directory``; yield the manifest after each engine, which the caller writes.

    An engine is kept once the caller asks for the next: who finds it stale raises instead.

    Args:
        directory: where the graphs are.
        manifest: of the directory.
        targets: what to build for.
        components: all by default.
        profile: sizes that the engines accept.
        keep: a folder where finished engines are linked to as well, and taken from if they are
            there: those of an earlier run that was interrupted.
        report: told before each engine, and of the builder's steps.
    """
    if not targets:
        return
    (directory / ENGINES).mkdir(exist_ok=True)
    kept = () if keep is None else tuple(keep.iterdir())
    for path in kept:
        link_or_copy(path, directory / ENGINES / path.name)
    known = {f"{ENGINES}/{path.name}" for path in kept}
    chosen = list(components or manifest.components)
    jobs = [(target, name) for target in targets for name in chosen]
    for done, (target, name) in enumerate(jobs):
        report(Progress(step="build", detail=f"{name} ({target})", done=done, total=len(jobs)))
        manifest, built = _add_engine(directory, manifest, target, name, profile, known, report)
        yield manifest
        if keep is not None and built.file not in known:
            for file in (built.file, built.sidecar):
                link_or_copy(directory / file, keep / Path(file).name)
    for file in known - set(manifest.files):
        (directory / file).unlink()


def _add_engine(
    directory: Path,
    manifest: Manifest,
    target: str,
    name: str,
    profile: ShapeRanges | Mapping[str, Range] | None,
    known: Collection[str],
    report: Report,
) -> tuple[Manifest, EngineRecord]:
    source = graph_file(manifest, name)
    require_memory_to_build(
        name,
        manifest.components[name].nbytes,
        _num_blocks(manifest, name),
        manifest.precision,
    )
    built = build_engine(
        directory / source,
        directory / ENGINES,
        component=name,
        target=target,
        profile=profile_for(manifest, name, profile),
        precision=manifest.precision,
        inputs=_engine_inputs(manifest, name, source),
        onnx_sha256=_fingerprint(manifest, source),
        known={*manifest.files, *known},
        prepared=_preparation(name),
        progress=_phases(name, report),
    )
    engine, files = built.record, {**manifest.files, **built.files}
    for file in (engine.file, engine.sidecar):
        if file not in files:  # of an earlier run
            files[file] = record(directory / file)
    others = tuple(e for e in manifest.engines if e.file != engine.file)
    return replace(manifest, engines=(*others, engine), files=files), engine


def _preparation(component: str) -> Prepare:
    """Choose what is done to a graph for its builder: a language model's pairs are joined.

    That needs onnx-ir. Where only engines are built it may be missing, and the memory for what the
    builder joins is there or not.
    """
    if not find_component(component).is_language or find_spec("onnx_ir") is None:
        return nullcontext
    from internvl_edge.export.graph.join_pairs import joined_graph

    return joined_graph


def _engine_inputs(manifest: Manifest, component: str, source: str) -> tuple[TensorSpec, ...]:
    """List the component's inputs; of a graph for engines, a cache has its compute type."""
    record, base = manifest.components[component], source.split(".")[1]
    if source == record.file:
        return record.inputs
    return tuple(
        replace(spec, dtype=COMPUTE_DTYPES[base]) if spec.name.startswith("past_") else spec
        for spec in record.inputs
    )


def _num_blocks(manifest: Manifest, component: str) -> int:
    llama, known = manifest.language_model, find_component(component)
    if component in COMPONENTS and known.tower is None:
        return 0
    if known.is_language and llama is not None:
        return int(llama["num_hidden_layers"])
    return int(manifest.model["vision"]["num_hidden_layers"])


def _phases(name: str, report: Report) -> Callable[[str, int, int], None]:
    """Turn the builder's own progress into ours."""

    def tell(phase: str, done: int, total: int) -> None:
        report(Progress(step="build", detail=f"{name}: {phase}", done=done, total=total))

    return tell


def _fingerprint(manifest: Manifest, graph: str) -> str:
    """Identify a graph together with the weights files it may read.

    A linked shard counts by its header, whether or not ``verify --full`` has hashed the rest.
    """
    names = [graph, *sorted(n for n in manifest.files if n.endswith(".safetensors"))]
    files = [manifest.files[name] for name in names]
    hashes = "".join(str(file.header_sha256 or file.sha256) for file in files)
    return hashlib.sha256(hashes.encode()).hexdigest()


def graph_file(manifest: Manifest, component: str) -> str:
    """Find the graph that a component's engines are built from."""
    base = (manifest.recipe or {}).get("engine_base")
    other = engine_graph(component, str(base))
    return other if other in manifest.files else manifest.components[component].file
