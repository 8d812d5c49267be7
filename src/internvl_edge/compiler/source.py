"""The checkpoint that a directory was made from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from internvl_edge.artifact import Artifact
from internvl_edge.compiler.oracle.simulate import Quantization
from internvl_edge.errors import UsageError
from internvl_edge.export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from internvl_edge.export.checkpoint.shards import source_files
from internvl_edge.quantize.fold import source_of
from internvl_edge.quantize.recipe import Recipe

MAX_LISTED = 3  # shards, in an error


def open_source(artifact: Artifact, checkpoint: Path) -> Checkpoint:
    """Open the checkpoint that a directory was made from.

    Raises:
        UsageError: it is another one.
    """
    manifest = artifact.manifest
    opened = open_checkpoint(
        checkpoint, tuple(manifest.components), is_quantized=manifest.recipe is not None
    )
    expected = manifest.source["files"]
    files = source_files(opened.shards)
    if files != expected:
        of_old = {name: shard["nbytes"] for name, shard in expected.items()}
        of_this = {name: shard["nbytes"] for name, shard in files.items()}
        difference = (
            "its shards have the same names and sizes, and other tensors"
            if of_old == of_this
            else f"expected {_listed(of_old)}, found {_listed(of_this)}"
        )
        raise UsageError(
            f"{artifact.path} was not made from {checkpoint}: {difference}; name its checkpoint "
            f"with --checkpoint, a folder that was called {artifact.manifest.source['checkpoint']}"
        )
    return opened


def _listed(shards: Mapping[str, int]) -> str:
    """List the first shards with their sizes."""
    some = [f"{name} of {nbytes} bytes" for name, nbytes in [*shards.items()][:MAX_LISTED]]
    return ", ".join([*some, *[f"{len(shards) - MAX_LISTED} more"] * (len(shards) > MAX_LISTED)])


def quantization_of(artifact: Artifact, checkpoint: Checkpoint) -> Quantization | None:
    """Read how a published directory is quantized; None where it is not."""
    if artifact.manifest.recipe is None:
        return None
    recipe = Recipe.from_json(artifact.manifest.recipe)
    source = source_of(checkpoint, recipe)
    return Quantization.read(artifact.path, recipe, source, artifact.manifest.files)
