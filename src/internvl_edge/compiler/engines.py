"""Engines for a directory: built from its graphs, recorded in its manifest."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from internvl_edge.artifact import EngineRecord, Manifest
from internvl_edge.compiler.options import TARGETS, Progress, Report, require_choice, silent
from internvl_edge.errors import MissingDependency, UsageError
from internvl_edge.export.engine import Profile, build_engine
from internvl_edge.publish import record, update, write_manifest

ENGINES = "engines"
PACKAGES = {"tensorrt-rtx": ("tensorrt_rtx", "rtx"), "tensorrt": ("tensorrt", "trt")}


def require_targets(targets: Sequence[str]) -> None:
    """Raise MissingDependency unless the builder of every target is installed."""
    for target in targets:
        require_choice("target", target, TARGETS)
        module, extra = PACKAGES[target]
        if importlib.util.find_spec(module) is None:
            raise MissingDependency.of(target, extra)


def engine_graph(component: str, base: str) -> str:
    """The graph that engines are built from, where it is not the component's own."""
    return f"{component}.{base}.onnx"


def profile_from(**sizes: str) -> Profile:
    """A profile from texts such as ``batch="1,4,16"``: smallest, usual and largest size.

    Raises:
        UsageError: not three whole numbers in order.
    """
    ranges = {}
    for name, text in sizes.items():
        parts = text.split(",")
        if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
            raise UsageError(f"--{name}: expected three sizes such as 1,4,16, found {text!r}")
        ranges[name] = (int(parts[0]), int(parts[1]), int(parts[2]))
    return Profile(**ranges)


def build(
    out: Path,
    targets: Sequence[str],
    *,
    components: Sequence[str] | None = None,
    profile: Profile | None = None,
    report: Report = silent,
) -> list[EngineRecord]:
    """Build engines for a published directory and add them to it.

    Args:
        out: the directory.
        targets: ``tensorrt-rtx``, ``tensorrt`` or both.
        components: all of them by default.
        profile: batch sizes and text lengths that the engines accept.
        report: told before each engine.

    Raises:
        ArtifactError: the directory is not what its manifest says.
        MissingDependency: a target's package is not installed.
        BuildError: TensorRT refused a graph; what was built before stays.
    """
    require_targets(targets)
    with update(out) as artifact:
        unknown = set(components or ()) - set(artifact.manifest.components)
        if unknown:
            raise UsageError(
                f"component {', '.join(sorted(unknown))}: {out} has "
                f"{', '.join(artifact.manifest.components)}"
            )
        manifest = add_engines(
            out, artifact.manifest, targets, components=components, profile=profile, report=report
        )
        write_manifest(out, manifest)
    return list(manifest.engines)


def add_engines(
    directory: Path,
    manifest: Manifest,
    targets: Sequence[str],
    *,
    components: Sequence[str] | None = None,
    profile: Profile | None = None,
    report: Report = silent,
) -> Manifest:
    """Build into ``directory``; the manifest with the new engines, which the caller writes."""
    chosen = list(components or manifest.components)
    jobs = [(target, name) for target in targets for name in chosen]
    for done, (target, name) in enumerate(jobs):
        report(Progress(step="build", detail=f"{name} ({target})", done=done, total=len(jobs)))
        manifest = _add_engine(directory, manifest, target, name, profile or Profile())
    return manifest


def _add_engine(
    directory: Path, manifest: Manifest, target: str, name: str, profile: Profile
) -> Manifest:
    (directory / ENGINES).mkdir(exist_ok=True)
    source = _graph_file(manifest, name)
    built = build_engine(
        directory / source,
        directory / ENGINES,
        component=name,
        target=target,
        profile=profile,
        precision=manifest.precision,
        inputs=manifest.components[name].inputs,
        onnx_sha256=_fingerprint(manifest, source),
        known=manifest.files,
    )
    files = {**manifest.files}
    for file in (built.file, built.sidecar):
        files[file] = record(directory / file)
    others = tuple(e for e in manifest.engines if e.file != built.file)
    return replace(manifest, engines=(*others, built), files=files)


def _fingerprint(manifest: Manifest, graph: str) -> str:
    """Identifies a graph together with the weights files it may read."""
    files = [graph, *sorted(n for n in manifest.files if n.endswith(".safetensors"))]
    hashes = "".join(manifest.files[name].sha256 for name in files)
    return hashlib.sha256(hashes.encode()).hexdigest()


def _graph_file(manifest: Manifest, component: str) -> str:
    base = (manifest.recipe or {}).get("engine_base")
    other = engine_graph(component, str(base))
    return other if other in manifest.files else manifest.components[component].file
