"""A published directory compared with its checkpoint again, as its export compared it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from internvl_edge.artifact import Artifact, Manifest, open_artifact
from internvl_edge.compiler.oracle.checker import Checker
from internvl_edge.compiler.oracle.simulate import Quantization
from internvl_edge.compiler.plan import (
    DrawSamples,
    ExportOptions,
    Hardware,
    Plan,
    demo_checkpoint,
    require_bounds,
)
from internvl_edge.compiler.progress import Progress, Report, silent
from internvl_edge.compiler.source import open_source, quantization_of
from internvl_edge.compiler.steps.calibration.samples import load_samples, samples_for
from internvl_edge.compiler.steps.verify import is_compared_whole, require_no_bounds
from internvl_edge.errors import CalibrationError, MissingDependency, UsageError
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.export.checkpoint.side_files import read_preprocessing
from internvl_edge.export.compare import CostBounds
from internvl_edge.export.graph.uint8_input import preprocessing_inside
from internvl_edge.export.towers.streams import Samples


def verify(
    out: Path,
    checkpoint: Path | None = None,
    report: Report = silent,
    *,
    min_sqnr: float | None = None,
    max_drop: float | None = None,
    calibration: Path | None = None,
    samples: DrawSamples | None = None,
    hardware: Hardware = Hardware(),
) -> dict[str, dict[str, Any]]:
    """Check a published directory again, and with a checkpoint, compare it with PyTorch.

    A quantized directory is compared on the samples that it was calibrated on where they are here
    again, else on noise. Bounds that were set at its export are held again on the same inputs.

    Args:
        out: the directory; its hashes and structure are always checked.
        checkpoint: the one it was made from; None leaves the comparison out.
        report: told before each component.
        min_sqnr: dB that every component must keep; None: as at its export.
        max_drop: of the worst row's cosine; None: as at its export.
        calibration: the folder that it was calibrated on; None: it may be a bundled set.
        samples: draws the set that it was calibrated on, as ``ExportOptions.samples``.
        hardware: what runs the graphs.

    Returns:
        Component → figures; empty dictionaries without a checkpoint.

    Raises:
        ArtifactError: the directory is not what its manifest says.
        UsageError: another checkpoint than the one it was made from, or other images; bounds that
            cannot be held.
        VerificationError: a component disagrees, or costs more than a bound allows.
    """
    require_bounds(min_sqnr, max_drop)
    asked = CostBounds(min_sqnr_db=min_sqnr, max_drop=max_drop)
    artifact = open_artifact(out)
    if checkpoint is None:
        if asked or calibration is not None:
            raise UsageError("--min-sqnr, --max-drop and --calib compare; add --checkpoint")
        return {name: {} for name in artifact.manifest.components}
    opened = open_source(artifact, checkpoint)
    quantization = quantization_of(artifact, opened)
    base = engine_base = artifact.manifest.precision
    if quantization is not None:
        base, engine_base = quantization.recipe.base or "fp32", quantization.recipe.engine_base
    kind = artifact.manifest.precision if quantization is None else "quantized"
    whole = is_compared_whole(opened, kind)
    if not whole:
        require_no_bounds(asked, "leave them out")
    same = None
    if quantization is not None and whole:
        same = _samples_again(artifact, opened, quantization, calibration, samples)
    elif calibration is not None:
        raise UsageError(f"--calib {calibration}: {out} is compared without images; leave it out")
    is_repeated = whole and (quantization is None or same is not None)
    figures: dict[str, dict[str, Any]] = {}
    with hardware.threads_of_torch():
        checker = Checker(
            opened,
            artifact.manifest.image_size,
            same,
            quantization,
            whole=whole,
            preprocessing=preprocessing_inside(artifact.manifest),
            bounds=asked or (_recorded_bounds(artifact.manifest) if is_repeated else None),
            hardware=hardware,
        )
        for done, name in enumerate(artifact.manifest.components):
            total = len(artifact.manifest.components)
            report(Progress(step="verify", detail=name, done=done, total=total))
            figures[name] = checker.check_both(
                name,
                artifact.onnx_path(name),
                artifact.manifest.precision,
                base,
                engine_base,
                artifact.manifest.files,
            )
        if whole:
            checker.check_joined(out, artifact.manifest.files)
    return figures


def _recorded_bounds(manifest: Manifest) -> CostBounds:
    """Read the bounds that a directory was exported with; they are the same for all components."""
    for record in manifest.components.values():
        recorded = (record.verification or {}).get("bounds")
        if isinstance(recorded, dict):
            numbers = {
                name: float(value)
                for name, value in recorded.items()
                if name in ("min_sqnr_db", "max_drop") and type(value) in (int, float)
            }
            return CostBounds(**numbers)
    return CostBounds()


def _samples_again(
    artifact: Artifact,
    checkpoint: Checkpoint,
    quantization: Quantization,
    calibration: Path | None,
    draw: DrawSamples | None,
) -> Samples | None:
    """Make the samples that a directory was calibrated on once more; None: they are not here.

    Raises:
        UsageError: the folder given holds other ones.
    """
    manifest = artifact.manifest
    used = manifest.source.get("calibration")
    digest = used.get("sha256") if isinstance(used, dict) else None
    options = ExportOptions(out=artifact.path, calibration=calibration, samples=draw)
    plan = Plan(
        options=options,
        checkpoint=checkpoint,
        components=tuple(manifest.components),
        image_size=manifest.image_size,
        preprocessing=read_preprocessing(checkpoint.path, manifest.image_size),
        recipe=quantization.recipe,
        is_demo=checkpoint.path.resolve() == demo_checkpoint().resolve(),
        source=quantization.source,
    )
    try:
        found = load_samples(plan)
    except (CalibrationError, MissingDependency):
        if calibration is not None:
            raise
        return None
    if found.digest == digest:
        return samples_for(plan, found)
    if calibration is not None:
        raise UsageError(
            f"--calib {calibration}: expected the images that {artifact.path} was calibrated on, "
            f"{used and used.get('name')}, found others; leave --calib out to compare on noise"
        )
    return None
