"""Does a Q/DQ graph follow the rules of the builders that shall fuse it, and where does it not?

A pair in the wrong place is no error: the graph builds, runs, and is as slow as in 16 bits, or as
wrong as its rounding. So every rule of ``lintrules`` is checked on the graph itself, ours or
another tool's, and what is broken is said with the node, what was found and what to do.

The file is gated by ``onnxwire`` before a parser of ONNX sees it. Weights are not loaded: sizes
come from shapes, and of constants only scales and zero points are read, where their file is there.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common as passes

from internvl_edge.artifact.onnx_wire import MAX_NBYTES, read_message
from internvl_edge.errors import ArtifactError, InternVLError, UsageError
from internvl_edge.files.disk import open_regular
from internvl_edge.quantize.lint import placement, scales
from internvl_edge.quantize.lint.rules import RULES, Finding, Rule
from internvl_edge.quantize.lint.view import View

__all__ = ["GPUS", "RULES", "Finding", "Rule", "is_clean", "lint", "lint_model", "sm_of"]

GPUS = {  # that TensorRT or TensorRT-RTX builds for
    "sm75": "Turing",
    "sm80": "A100",
    "sm86": "Ampere",
    "sm87": "Orin",
    "sm89": "Ada",
    "sm90": "Hopper",
    "sm100": "Blackwell",
    "sm103": "Blackwell Ultra",
    "sm110": "Thor",
    "sm120": "Blackwell RTX",
    "sm121": "GB10",
}


def sm_of(gpu: str) -> int:
    """The compute capability of a GPU by name: 86 of ``sm86``, in whatever case.

    Raises:
        UsageError: none that is known.
    """
    name = gpu.strip().lower()
    if name not in GPUS:
        known = ", ".join(f"{name} ({gpus})" for name, gpus in GPUS.items())
        raise UsageError(f"--gpu: expected one of {known}, found {gpu!r}")
    return int(name.removeprefix("sm"))


def lint(path: Path, gpu: str | None = None) -> list[Finding]:
    """Every place where an ONNX file breaks a rule of Q/DQ placement.

    Args:
        path: the file; what it stores in others need not be there, but values of scales that are
            not cannot be judged.
        gpu: what that it shall run on, a key of ``GPUS``; None: nothing is assumed.

    Returns:
        In the order of the rules, and of the graph.

    Raises:
        ArtifactError: it is not ONNX, or cannot be read.
        UsageError: a GPU that is not known.
    """
    sm = None if gpu is None else sm_of(gpu)
    if path.is_dir():
        inside = sorted(path.glob("*.onnx"))
        hint = f"; {len(inside)} are in it, such as {inside[0]}" if inside else ""
        raise ArtifactError(f"{path}: expected FILE.onnx, found a folder{hint}")
    try:
        with open_regular(path) as file:
            data = file.read(MAX_NBYTES + 1)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        message = read_message(data, "Model")
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    if not message.get("graph", {}).get("nodes"):
        raise ArtifactError(f"{path}: not ONNX: expected a graph with nodes, found none")
    del data, message
    try:
        return lint_model(ir.load(path), sm)
    except InternVLError:
        raise
    except Exception as error:  # whatever a parser makes of a hostile file
        raise ArtifactError(
            f"{path}: expected a sound ONNX graph; {type(error).__name__}: {error}"
        ) from error


def lint_model(model: ir.Model, sm: int | None = None) -> list[Finding]:
    """The same of a model in memory; shapes that it does not say are inferred, in place."""
    if any(value.shape is None for node in model.graph for value in node.outputs):
        passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
    view = View(model, sm)
    checks = (*scales.CHECKS, *placement.CHECKS)
    return [found for check in checks for found in check(view)]


def is_clean(findings: list[Finding]) -> bool:
    """Whether there is nothing but notes."""
    return all(found.severity == "note" for found in findings)
