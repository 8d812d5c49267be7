"""What an export is asked for: refused by name before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path

from internvl_edge.cli.embed import IMAGE_SUFFIXES
from internvl_edge.errors import CheckpointError, UsageError, did_you_mean

AUTO = "auto"
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8", "int8-wo", "int4-wo", AUTO)
CHECKPOINT_FILE, ARTIFACT_FILE = "config.json", "manifest.json"


def is_searched(precision: str, max_drop: float | None, metric: str | None) -> bool:
    """Whether the layers in 16 bits are searched for; refuses options that go with another."""
    if "=" not in precision and precision not in PRECISIONS:
        raise UsageError(
            f"--precision {precision}: expected one of {', '.join(PRECISIONS)}, or one per tower "
            f"such as vision=int8,decoder=int4-wo{did_you_mean(precision, PRECISIONS)}"
        )
    is_auto = precision == AUTO
    if is_auto and max_drop is None:
        raise UsageError(
            "--precision auto: expected how much may be lost; add --max-drop, such as 1e-4"
        )
    for name, value in (("--max-drop", max_drop), ("--metric", metric)):
        if value is not None and not is_auto:
            raise UsageError(
                f"{name} {value}: of --precision auto, found --precision {precision}; choose "
                f"auto, or leave {name} out"
            )
    return is_auto


def require_checkpoint(path: Path | None) -> None:
    """Tell a folder of another kind from a checkpoint; what is wrong inside one is said later."""
    if path is None or not path.is_dir() or (path / CHECKPOINT_FILE).exists():
        return
    if (path / ARTIFACT_FILE).exists():
        raise CheckpointError(
            f"{path} is a compiled directory ({ARTIFACT_FILE}); expected a checkpoint, the folder "
            f"with {CHECKPOINT_FILE} and the weights it was made from"
        )
    is_pictures = any(file.suffix.lower() in IMAGE_SUFFIXES for file in path.iterdir())
    raise CheckpointError(
        f"{path}: expected a checkpoint, a folder with {CHECKPOINT_FILE} and weights; found no "
        f"{CHECKPOINT_FILE} in it{'; pictures to calibrate on go to --calib' * is_pictures}"
    )


def neither(path: Path) -> str:
    found = (
        "found neither"
        if path.is_dir()
        else "it is a file"
        if path.exists()
        else "it does not exist"
    )
    return (
        f"{path}: expected a folder, a checkpoint with {CHECKPOINT_FILE} or a compiled directory "
        f"with {ARTIFACT_FILE}; {found}"
    )


def require_components(chosen: tuple[str, ...] | None) -> None:
    """Refuse what no checkpoint has; whether this one has them is seen later."""
    from internvl_edge.export.components import COMPONENTS

    for name in chosen or ():
        if name not in COMPONENTS:
            raise UsageError(
                f"component {name!r}: expected some of {', '.join(COMPONENTS)}"
                f"{did_you_mean(name, COMPONENTS)}"
            )
