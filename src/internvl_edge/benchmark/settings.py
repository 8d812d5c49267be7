"""Settings of a benchmark: what is measured, on which inputs, and compared with what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from internvl_edge.artifact import Artifact, open_artifact
from internvl_edge.artifact.components import embedder_of
from internvl_edge.benchmark.contenders import AGAINST, Contender, contender_of
from internvl_edge.benchmark.inputs import seeded_picture
from internvl_edge.errors import InputError, UsageError, did_you_mean
from internvl_edge.runtime.openvino.options import OpenVinoOptions
from internvl_edge.runtime.ort.options import OrtOptions
from internvl_edge.runtime.session import require_backend, runs_engines

__all__ = [
    "AGAINST",
    "Settings",
    "choose_components",
    "open_artifacts",
    "read_picture",
    "reference_of",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings shared by all measurements."""

    artifacts: Mapping[str, Artifact]  # by the path that was given
    components: tuple[str, ...]  # of every artifact
    batch_sizes: tuple[int, ...]
    picture: bytes  # a file's, timed from there to its embedding
    against: str | None  # another way to the same job
    reference: Contender | None  # of that name
    backend: str
    device: str
    options: OrtOptions | OpenVinoOptions | None  # of every session; None: the backend's defaults
    scenario: str
    streams: int
    seconds: float
    p99_ms: float | None
    has_memory: bool  # measure the memory of each component too
    has_roofline: bool  # and the peaks of this machine


def open_artifacts(outs: Sequence[Path]) -> dict[str, Artifact]:
    """Open compiled directories, by the path that was given.

    Raises:
        UsageError: two are the same.
    """
    if len({out.resolve() for out in outs}) < len(outs):
        raise UsageError(f"expected different directories, found {', '.join(map(str, outs))}")
    return {str(out): open_artifact(out) for out in outs}


def choose_components(
    artifacts: Mapping[str, Artifact], names: tuple[str, ...] | None
) -> tuple[str, ...]:
    """Choose the components asked for; by default those that every directory has.

    Raises:
        UsageError: one is not in every directory, or they have none in common.
    """
    shared = [
        name
        for name in next(iter(artifacts.values())).manifest.components
        if all(name in artifact.manifest.components for artifact in artifacts.values())
    ]
    unknown = [name for name in names or () if name not in shared]
    if unknown or not shared:
        hint = did_you_mean(unknown[0], shared) if unknown else ""
        raise UsageError(
            f"component {', '.join(unknown) or 'list'}: all of the directories have "
            f"{', '.join(shared) or 'none in common'}{hint}"
        )
    return names or tuple(shared)


def read_picture(path: Path | None, components: tuple[str, ...]) -> bytes:
    """Read the picture that is timed; None makes one.

    Raises:
        UsageError: there is one, and no component embeds it.
        InputError: it cannot be read.
    """
    if path is None:
        return seeded_picture()
    if embedder_of(components) is None:
        raise UsageError(f"--image {path}: none of {', '.join(components)} embeds a picture")
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"--image {path}: cannot be read: {error.strerror}") from error


def reference_of(
    against: str | None,
    checkpoint: Path | None,
    artifacts: Mapping[str, Artifact],
    backend: str,
    device: str = "auto",
) -> Contender | None:
    """Open the other way to the same job, on the GPU where the directories run on one."""
    if against is None:
        return None
    place = "cuda" if _runs_on_gpu(backend, device) else "cpu"
    return contender_of(against, checkpoint, artifacts, device=place)


def _runs_on_gpu(backend: str, device: str) -> bool:
    if runs_engines(require_backend(backend)):
        return True
    from internvl_edge.runtime.ort.options import CPU, choose_providers

    return choose_providers(device) != [CPU]
