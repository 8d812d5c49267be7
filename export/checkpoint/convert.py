"""Pickle checkpoints to safetensors, on explicit request and in a process of their own.

A pickle can run code when it is loaded. ``torch.load(weights_only=True)`` admits tensors and
plain containers only; it has had holes, so the file is read in a subprocess that holds nothing
else, PyTorch older than the last known fix is refused, and there is no fallback to full
unpickling. Everything after this step reads safetensors.

Original ``.pth`` files of InternViT name their parameters as timm does; they are renamed here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from internvl_edge.errors import CheckpointError, MissingDependency, ResourceError, UsageError
from internvl_edge.export.checkpoint.relayout import convert_layout
from internvl_edge.export.checkpoint.shards import PICKLE_SUFFIXES
from internvl_edge.export.checkpoint.side_files import MAX_NBYTES, refuse_foreign
from internvl_edge.files.disk import os_errors
from internvl_edge.files.reading import open_file, read_file

__all__ = ["convert_layout", "convert_pickles"]

OLDEST_TORCH = (2, 10)  # CVE-2026-24747
DISK_FULL = 28  # exit code of the subprocess
RENAMED = (
    (re.compile(r"^cls_token$"), "embeddings.class_embedding"),
    (re.compile(r"^pos_embed$"), "embeddings.position_embedding"),
    (re.compile(r"^patch_embed\.proj\."), "embeddings.patch_embedding."),
    (re.compile(r"^blocks\."), "encoder.layers."),
    (re.compile(r"\.(ls[12])\.gamma$"), r".\1"),
)


def convert_pickles(source: Path, out: Path) -> int:
    """Write every pickle shard of ``source`` as safetensors to the new directory ``out``.

    Args:
        source: a directory with ``config.json`` and ``*.bin`` or ``*.pth`` files.
        out: must not exist.

    Returns:
        The number of tensors.

    Raises:
        CheckpointError: nothing to convert, or a file that is not a plain pickle of tensors.
        UsageError: ``out`` exists or cannot be written.
        ResourceError: the disk is full.
        MissingDependency: PyTorch is older than the last fix of its restricted loader.
    """
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        raise MissingDependency(
            f"torch {torch.__version__} cannot load untrusted pickles safely; at least "
            f'{".".join(map(str, OLDEST_TORCH))}: pip install "internvl-edge[export]"'
        )
    if out.exists():
        raise UsageError(f"{out}: already exists; convert writes a new directory")
    if not source.is_dir():
        reason = "it is a file" if source.exists() else "it does not exist"
        raise CheckpointError(
            f"{source}: expected a folder with config.json and {', '.join(PICKLE_SUFFIXES)} "
            f"files; {reason}"
        )
    pickles = _weights_of(source)
    if not pickles:
        raise CheckpointError(f"{source}: no {', '.join(PICKLE_SUFFIXES)} file to convert")
    staged = out.absolute().with_name(f".{out.name}.{os.getpid()}.partial")
    with os_errors(out):
        staged.mkdir(parents=True)
        try:
            count = sum(
                _convert_in_subprocess(p, staged / f"{p.stem}.safetensors") for p in pickles
            )
            for side in source.glob("*"):
                if side.suffix in (".json", ".model") and not side.name.endswith(".index.json"):
                    refuse_foreign(side)
                    data = read_file(side, MAX_NBYTES, CheckpointError)
                    (staged / side.name).write_bytes(data)
            staged.rename(out)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
    return count


def _weights_of(source: Path) -> list[Path]:
    """List the pickles that hold the model, without the trainer's state."""
    pickles = sorted(p for p in source.glob("*") if p.suffix in PICKLE_SUFFIXES)
    named = [p for p in pickles if p.name.startswith(("pytorch_model", "model"))]
    return named or pickles


def _convert_in_subprocess(pickle: Path, target: Path) -> int:
    # -P keeps the current directory, which may be the download itself, off the import path.
    module = "internvl_edge.export.checkpoint.convert"
    command = [sys.executable, "-P", "-m", module, str(pickle), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == DISK_FULL:
        raise ResourceError(f"{target.parent}: the disk is full; free some space")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CheckpointError(f"{pickle}: not a plain pickle of tensors: {reason}")
    return int(done.stdout.strip().splitlines()[-1])


def convert_file(pickle: Path, target: Path) -> int:
    """Load one pickle with the restricted loader and write its tensors; how many there were."""
    with (
        open_file(pickle, CheckpointError) as file,
        open(file.fileno(), "rb", closefd=False) as opened,
    ):
        loaded = torch.load(opened, map_location="cpu", weights_only=True, mmap=False)
    state = loaded.get("module", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise CheckpointError(f"{pickle}: expected a dictionary of tensors")
    tensors = {rename(str(name)): tensor.contiguous().clone() for name, tensor in state.items()}
    try:
        save_file(tensors, target, metadata={"format": "pt"})
    except SafetensorError as error:
        sys.exit(DISK_FULL if "space" in str(error) else str(error))
    return len(tensors)


def rename(name: str) -> str:
    """Turn a parameter's original ``.pth`` name into its published Hugging Face name."""
    for pattern, replacement in RENAMED:
        name = pattern.sub(replacement, name)
    return name


if __name__ == "__main__":
    sys.stdout.write(f"{convert_file(Path(sys.argv[1]), Path(sys.argv[2]))}\n")
