"""The table of packages that this one works with: what each is for, and which are installed.

A package is named as in an index (``onnx-ir``), and found by the module that it brings
(``onnx_ir``). Nothing is imported to find out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from internvl_edge.errors import MissingDependency

__all__ = [
    "COMPILED_WITH",
    "EXPORT",
    "MEASURED_WITH",
    "PACKAGES",
    "TRACED_WITH",
    "Package",
    "is_installed",
    "require",
    "version_of",
    "versions",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A package, and the extra of ours that installs it."""

    name: str
    module: str
    extra: str
    unlocks: str | None  # what it is needed for; None: it comes with the others of its extra


PACKAGES = {
    name: Package(name=name, module=module, extra=extra, unlocks=unlocks)
    for name, module, extra, unlocks in (
        ("torch", "torch", "export", "export"),
        ("onnx", "onnx", "export", "export"),
        ("onnx-ir", "onnx_ir", "export", "export"),
        ("onnxscript", "onnxscript", "export", "export"),
        ("safetensors", "safetensors", "export", "export"),
        ("ml-dtypes", "ml_dtypes", "ort", None),
        ("onnxruntime", "onnxruntime", "ort", "run on the CPU, verify"),
        ("onnxruntime-gpu", "onnxruntime", "ort-gpu", "run on an NVIDIA GPU"),
        ("openvino", "openvino", "openvino", "run image towers on the CPU in bfloat16"),
        ("tensorrt-rtx", "tensorrt_rtx", "rtx", "build RTX engines, without a GPU"),
        ("tensorrt", "tensorrt", "trt", "build TensorRT engines, on a GPU"),
        ("cuda-core", "cuda.core", "rtx", "run engines"),
        ("tokenizers", "tokenizers", "chat", "texts of Qwen, Llama-3 and *-hf models"),
        ("scikit-image", "skimage", "quantize", "the default calibration photographs"),
        ("scikit-learn", "sklearn", "demo", "the demo's digits"),
        ("starlette", "starlette", "serve", "serve over HTTP"),
        ("uvicorn", "uvicorn", "serve", None),
        ("prometheus-client", "prometheus_client", "serve", None),
        ("pyarrow", "pyarrow", "parquet", "embed into Parquet"),
        ("ray", "ray", "ray", "embed on several machines"),
    )
}

EXPORT = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "safetensors")  # its imports
# Packages whose versions are written down, in the order in which they are shown: of the tracer,
# with what a directory was compiled, and with what it was measured.
TRACED_WITH = ("numpy", "onnx-ir", "onnxscript")
COMPILED_WITH = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy", "tensorrt-rtx")
MEASURED_WITH = (
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-bindings",
    "openvino",
    "torch",
)


def is_installed(module: str) -> bool:
    """Tell whether there is a module of this name, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that a dotted name begins with
        return False


def require(*names: str) -> None:
    """Check that packages of the table are installed.

    Raises:
        MissingDependency: the first that is missing, and the extra that brings it.
    """
    for name in names:
        if not is_installed(PACKAGES[name].module):
            raise MissingDependency.of(name, PACKAGES[name].extra)


def version_of(name: str) -> str | None:
    """Look up a package's version, in the table or not; None where it is not installed."""
    from importlib import metadata  # which takes a fifth of the runtime's import

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions(names: Sequence[str]) -> dict[str, str | None]:
    """Look up the versions of packages."""
    return {name: version_of(name) for name in names}
