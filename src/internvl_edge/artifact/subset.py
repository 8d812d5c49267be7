"""A compiled directory with fewer components, in a folder of its own: what one task needs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from internvl_edge.artifact.components import cpu_graph, cuda_graph, unsigned_graph
from internvl_edge.artifact.manifest import FOLDERS, Manifest
from internvl_edge.artifact.open import Artifact
from internvl_edge.artifact.publish import write_manifest

__all__ = ["graphs_of", "subset", "write_subset"]

GRAPH, DOCUMENTS = ".onnx", (".md", ".html")


def graphs_of(artifact: Artifact, component: str) -> tuple[str, ...]:
    """List the graphs of a component that ONNX Runtime may open, its own first."""
    own = artifact.manifest.components[component].file
    others = (unsigned_graph(component), cpu_graph(component), cuda_graph(component))
    return (own, *(name for name in others if artifact.has(name)))


def subset(artifact: Artifact, components: Collection[str]) -> Manifest:
    """Make the manifest of a directory that has only some components, and no engines or reports.

    Of the files, those stay that these components' graphs are or lie in, and those that belong to
    no graph, such as a tokenizer's.
    """
    manifest = artifact.manifest
    graphs = {name for component in components for name in graphs_of(artifact, component)}
    weights = {location for graph in graphs for location in artifact.weights[graph]}
    of_graphs = {location for locations in artifact.weights.values() for location in locations}
    kept = {
        name: record
        for name, record in manifest.files.items()
        if name in graphs | weights or (name not in of_graphs and _is_shared(name))
    }
    source = dict(manifest.source)
    if type(source.get("weights")) is dict:
        source["weights"] = {name: how for name, how in source["weights"].items() if name in kept}
    return replace(
        manifest,
        components={n: r for n, r in manifest.components.items() if n in components},
        engines=(),
        files=kept,
        source=source,
    )


def _is_shared(name: str) -> bool:
    """Tell whether a file that is no weights is read whatever the component."""
    folder = name.partition("/")[0]
    return folder not in FOLDERS and not name.endswith((GRAPH, *DOCUMENTS))


def write_subset(artifact: Artifact, components: Collection[str], folder: Path) -> None:
    """Write a directory with only some components into an empty folder: hard links, else copies.

    Raises:
        ArtifactError: the directory is no longer what was opened.
        OSError: a file cannot be written.
    """
    manifest = subset(artifact, components)
    for name in manifest.files:
        artifact.bring(name, folder / name)
    write_manifest(folder, manifest)
