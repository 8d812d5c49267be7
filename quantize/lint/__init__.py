"""Checks of a Q/DQ graph against the rules of the builders that will fuse it.

A misplaced pair causes no error: the graph builds and runs, but as slowly as in 16 bits, or less
accurately than it should. So every rule is checked on the graph itself, whether this project or
another tool wrote it; a finding names the node, what was found there and what to do.

rules      the rules in words; start here
placement  checks that look at a node's neighbours;  scales  checks of a node and its constants
specification  operators, types and attributes as ONNX has them
view       the graph's products, operands and attentions, which the checks read

``artifact.onnx_wire`` validates the file before an ONNX parser sees it. Weights are not loaded:
sizes come from shapes, and of the constants only scales and zero points are read, where their file
exists.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common as passes

from internvl_edge.artifact.onnx_gate import check_sizes
from internvl_edge.artifact.onnx_wire import MAX_NBYTES, read_message
from internvl_edge.errors import ArtifactError, InternVLError, UsageError
from internvl_edge.files.disk import open_regular
from internvl_edge.quantize.lint import placement, scales
from internvl_edge.quantize.lint.rules import RULES, Finding, Rule
from internvl_edge.quantize.lint.view import View

__all__ = ["GPUS", "RULES", "Finding", "Rule", "is_clean", "lint", "lint_model", "sm_of"]

GPUS = {  # those that TensorRT or TensorRT-RTX builds for
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
    """Return the compute capability of a GPU by name: 86 for ``sm86``, in upper or lower case.

    Raises:
        UsageError: the GPU is not known.
    """
    name = gpu.strip().lower()
    if name not in GPUS:
        known = ", ".join(f"{name} ({gpus})" for name, gpus in GPUS.items())
        raise UsageError(f"--gpu: expected one of {known}, found {gpu!r}")
    return int(name.removeprefix("sm"))


def lint(path: Path, gpu: str | None = None) -> list[Finding]:
    """Find every place where an ONNX file breaks a rule of Q/DQ placement.

    Args:
        path: the file; its external data may be absent, but then scales stored there cannot be
            checked.
        gpu: the GPU it will run on, a key of ``GPUS``; None: any.

    Returns:
        The findings, in the order of the rules and of the graph.

    Raises:
        ArtifactError: it is not ONNX, or cannot be read.
        UsageError: the GPU is not known.
    """
    sm = None if gpu is None else sm_of(gpu)
    if path.is_dir():
        inside = sorted(path.glob("*.onnx"))
        hint = f"; it contains {len(inside)}, such as {inside[0]}" if inside else ""
        raise ArtifactError(f"{path}: expected FILE.onnx, found a folder{hint}")
    try:
        with open_regular(path) as file:
            data = file.read(MAX_NBYTES + 1)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        message = read_message(data, "Model")
        check_sizes(message)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    if not message.get("graph", {}).get("nodes"):
        raise ArtifactError(f"{path}: not ONNX: expected a graph with nodes, found none")
    del data, message
    try:
        return lint_model(ir.load(path), sm)
    except InternVLError:
        raise
    except Exception as error:  # a parser may raise anything on a hostile file
        raise ArtifactError(
            f"{path}: expected a sound ONNX graph; {type(error).__name__}: {error}"
        ) from error


def lint_model(model: ir.Model, sm: int | None = None) -> list[Finding]:
    """Check a model in memory as ``lint`` does; missing shapes are inferred, in place."""
    if any(value.shape is None for node in model.graph for value in node.outputs):
        passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
    view = View(model, sm)
    checks = (*scales.CHECKS, *placement.CHECKS)
    return [finding for check in checks for finding in check(view)]


def is_clean(findings: list[Finding]) -> bool:
    """Tell whether there are only notes."""
    return all(finding.severity == "note" for finding in findings)
