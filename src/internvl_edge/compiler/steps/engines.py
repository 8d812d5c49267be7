"""Engines for a directory: built from its graphs, recorded in its manifest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from internvl_edge.artifact import EngineRecord, Manifest
from internvl_edge.artifact.publish import record, sound_engines, update, write_manifest
from internvl_edge.compiler.cost import Cost, Forecast
from internvl_edge.compiler.progress import Progress, Report, silent
from internvl_edge.compiler.steps.graph_files import (
    engine_inputs,
    fingerprint,
    graph_base,
    graph_file,
    num_blocks,
    preparation,
)
from internvl_edge.compiler.steps.profiles import Asked, profile_for, require_dimensions
from internvl_edge.compiler.steps.step import Build
from internvl_edge.errors import BuildError, ResourceError, UsageError, did_you_mean
from internvl_edge.export.engine.build import ShapeRanges, build_engine
from internvl_edge.export.engine.memory import (
    builder_nbytes,
    engine_nbytes,
    joined_nbytes,
    require_memory_to_build,
)
from internvl_edge.export.engine.targets import choose_capabilities, find_target
from internvl_edge.files.disk import link_or_copy
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


def require_targets(targets: Sequence[str], precision: str) -> None:
    """Make sure, before any work, that engines can be built for every target.

    Raises:
        UsageError: not a target that has engines.
        MissingDependency, HardwareError: its package, or the GPU that it builds on, is missing.
    """
    for name in targets:
        target = find_target(name)
        choose_capabilities(import_tensorrt(target.name), target, precision, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildEngines:
    """Build the engine of each component, one after the other, for each target."""

    targets: tuple[str, ...]
    weights: Mapping[str, int]  # component → bytes of its weights as an engine holds them
    depths: Mapping[str, int]  # component → blocks of its tower
    precision: str  # as it was asked for: one for all, or one per tower
    expect_fused: bool = False  # refuse engines that lost fused layers

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
            depths={name: num_blocks(manifest, name) for name in chosen},
            precision=manifest.precision,
        )

    def costs(self, plan: Plan | None = None) -> tuple[Cost, ...]:
        """State what each component's engines need; a directory's have no plan any more."""
        return tuple(self._cost(component) for component in self.depths)

    def _cost(self, component: str) -> Cost:
        nbytes, depth = self.weights[component], self.depths[component]
        mapped = nbytes + BUILDER_MAPPED_NBYTES  # the graph's weights
        joined = joined_nbytes(component, nbytes, self.precision)
        held = engine_nbytes(component, nbytes, self.precision)
        taken = builder_nbytes(component, nbytes, depth, self.precision)
        seconds = BUILD_SECONDS + BUILD_SECONDS_PER_BLOCK * depth
        seconds += nbytes / BUILD_NBYTES_PER_SECOND + joined / JOINED_NBYTES_PER_SECOND
        return Cost(
            name=f"build {component}",
            memory_nbytes=mapped + taken,
            mapped_nbytes=mapped,
            disk_nbytes=(held + ENGINE_NBYTES) * len(self.targets),
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
                expect_fused=self.expect_fused,
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
    profile: Asked,
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
        require_dimensions(manifest, chosen, profile or {})
    for name in chosen:
        profile_for(manifest, name, profile)


def build(
    out: Path,
    targets: Sequence[str],
    *,
    components: Sequence[str] | None = None,
    profile: Asked = None,
    expect_fused: bool = False,
    report: Report = silent,
) -> list[EngineRecord]:
    """Build engines for a published directory and add them to it.

    Args:
        out: the directory.
        targets: ``tensorrt-rtx``, ``tensorrt`` or both.
        components: all of them by default.
        profile: sizes that the engines accept, or ranges of some instead of the usual ones.
        expect_fused: refuse an engine that lost fused attention or 8-bit products.
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
            out,
            manifest,
            targets,
            components=components,
            profile=profile,
            expect_fused=expect_fused,
            report=report,
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
    profile: Asked = None,
    keep: Path | None = None,
    expect_fused: bool = False,
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
        expect_fused: refuse an engine that lost fused attention or 8-bit products.
        report: told before each engine, and of the builder's steps.
    """
    if not targets:
        return
    (directory / ENGINES).mkdir(exist_ok=True)
    kept = () if keep is None else sound_engines(keep)
    for path in kept:
        link_or_copy(path, directory / ENGINES / path.name)
    known = {f"{ENGINES}/{path.name}" for path in kept}
    chosen = list(components or manifest.components)
    jobs = [(target, name) for target in targets for name in chosen]
    for done, (target, name) in enumerate(jobs):
        report(Progress(step="build", detail=f"{name} ({target})", done=done, total=len(jobs)))
        manifest, built = _add_engine(
            directory, manifest, target, name, profile, known, expect_fused, report
        )
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
    profile: Asked,
    known: Collection[str],
    expect_fused: bool,
    report: Report,
) -> tuple[Manifest, EngineRecord]:
    source = graph_file(manifest, name)
    require_memory_to_build(
        name,
        manifest.components[name].nbytes,
        num_blocks(manifest, name),
        manifest.precision,
    )
    built = build_engine(
        directory / source,
        directory / ENGINES,
        component=name,
        target=target,
        profile=profile_for(manifest, name, profile),
        precision=manifest.precision,
        inputs=engine_inputs(manifest, name, source),
        onnx_sha256=fingerprint(manifest, source),
        known={*manifest.files, *known},
        prepared=preparation(name),
        base=graph_base(manifest, name),
        expect_fused=expect_fused,
        progress=_phases(name, report),
    )
    engine, files = built.record, {**manifest.files, **built.files}
    for file in (engine.file, engine.sidecar):
        if file not in files:  # of an earlier run
            files[file] = record(directory / file)
    others = tuple(e for e in manifest.engines if e.file != engine.file)
    return replace(manifest, engines=(*others, engine), files=files), engine


def _phases(name: str, report: Report) -> Callable[[str, int, int], None]:
    """Turn the builder's own progress into ours."""

    def tell(phase: str, done: int, total: int) -> None:
        report(Progress(step="build", detail=f"{name}: {phase}", done=done, total=total))

    return tell
