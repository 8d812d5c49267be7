"""``doctor``: what is installed, and what each missing piece would unlock."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from typing import Any

import click

from internvl_edge._version import __version__
from internvl_edge.artifact.sidecar import lacks_rtx
from internvl_edge.cli.console import Output
from internvl_edge.cli.options import answers, no_backend

# Package → what it unlocks, and the extra that installs it.
PACKAGES = {
    "torch": ("export", "export"),
    "onnx": ("export", "export"),
    "onnx-ir": ("export", "export"),
    "onnxscript": ("export", "export"),
    "safetensors": ("export", "export"),
    "onnxruntime": ("run on the CPU, verify", "ort"),
    "onnxruntime-gpu": ("run on an NVIDIA GPU", "ort-gpu"),
    "tensorrt-rtx": ("build RTX engines, without a GPU", "rtx"),
    "tensorrt": ("build TensorRT engines, on a GPU", "trt"),
    "cuda-core": ("run engines", "rtx"),
    "scikit-image": ("the default calibration photographs", "quantize"),
    "scikit-learn": ("the demo's digits", "demo"),
}


@click.command()
@no_backend
@answers
def doctor(output: Output, backend: str) -> None:
    """Say what is installed, what this machine has, and what each missing piece would unlock."""
    from internvl_edge.runtime.gpu.probe import gpus as probed_gpus

    rows, missing = [], {}
    for package, (unlocks, extra) in PACKAGES.items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = ""
            missing[package] = f'pip install "internvl-edge[{extra}]"'
        rows.append((package, version or "missing", unlocks, missing.get(package, "")))
    gpus = [
        {"name": gpu.name, "sm": gpu.sm, "runs_tensorrt_rtx": not lacks_rtx(gpu.sm)}
        for gpu in probed_gpus()
    ]
    machine = _machine() | {"cuda_devices": len(gpus)}
    output.table(("package", "version", "unlocks", "install"), rows)
    output.lines([f"{key}: {value}" for key, value in machine.items()])
    for index, gpu in enumerate(gpus):
        lack = "" if gpu["runs_tensorrt_rtx"] else ": not for TensorRT-RTX, but for TensorRT"
        output.lines([f"cuda:{index}: {gpu['name']}, SM{gpu['sm']}{lack}"])
    output.result(
        {
            "version": __version__,
            "machine": machine,
            "gpus": gpus,
            "packages": {name: version for name, version, _, _ in rows},
            "missing": missing,
            "execution_providers": _providers(),
        }
    )


def _machine() -> dict[str, Any]:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": f"{total / 1e9:.1f} GB, {free / 1e9:.1f} GB free",
        "disk": f"{shutil.disk_usage('.').free / 1e9:.1f} GB free here",
    }


def _providers() -> list[str]:
    if importlib.util.find_spec("onnxruntime") is None:
        return []
    import onnxruntime

    return list(onnxruntime.get_available_providers())
