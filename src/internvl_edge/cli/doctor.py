"""``doctor``: what is installed, and what each missing piece would unlock."""

from __future__ import annotations

import platform
import shutil
import sys
from typing import Any

import click

from internvl_edge._version import __version__
from internvl_edge.artifact.sidecar import lacks_rtx
from internvl_edge.cli.console import Output
from internvl_edge.cli.options import answers, no_backend
from internvl_edge.files.cores import usable_cores
from internvl_edge.files.memory import available_memory, total_memory
from internvl_edge.files.packages import PACKAGES, is_installed, versions
from internvl_edge.runtime.ort.cpu import cpu_features

RUNNERS = ("onnxruntime", "engines")  # on CUDA; the former dequantizes 8 bits in every call


@click.command()
@no_backend
@answers
def doctor(output: Output, backend: str) -> None:
    """Say what is installed, what this machine has, and what each missing piece would unlock."""
    from internvl_edge.runtime.gpu.probe import gpus as probed_gpus

    listed = {name: package for name, package in PACKAGES.items() if package.unlocks}
    installed = versions(tuple(listed))
    missing = {
        name: f'pip install "internvl-edge[{package.extra}]"'
        for name, package in listed.items()
        if installed[name] is None
    }
    rows = [
        (name, installed[name] or "missing", package.unlocks, missing.get(name, ""))
        for name, package in listed.items()
    ]
    gpus: list[dict[str, Any]] = [
        {
            "name": gpu.name,
            "sm": gpu.sm,
            "runs_tensorrt_rtx": not lacks_rtx(gpu.sm),
            "precisions": _precisions(gpu.sm),
        }
        for gpu in probed_gpus()
    ]
    machine = _machine() | {"cuda_devices": len(gpus)}
    output.table(("package", "version", "unlocks", "install"), rows)
    output.lines([f"{key}: {value}" for key, value in machine.items()])
    for index, gpu in enumerate(gpus):
        lack = "" if gpu["runs_tensorrt_rtx"] else ": not for TensorRT-RTX, but for TensorRT"
        output.lines([f"cuda:{index}: {gpu['name']}, SM{gpu['sm']}{lack}"])
        output.lines([f"  {runs}: {' or '.join(gpu['precisions'][runs])}" for runs in RUNNERS])
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


def _precisions(sm: int) -> dict[str, list[str]]:
    """Say which precisions are right for a GPU: those its tensor cores multiply in."""
    from internvl_edge.export.engine.targets import first_sm

    bits_16 = "bf16" if sm >= first_sm("bf16") else "fp16"
    bits_8 = ["fp8", "int8"] if sm >= first_sm("fp8") else ["int8"]
    return dict(zip(RUNNERS, ([bits_16, "int4-wo for decoders"], [bits_16, *bits_8]), strict=True))


def _machine() -> dict[str, Any]:
    memory = f"{available_memory() / 1e9:.1f} GB available"
    if (total := total_memory()) is not None:
        memory = f"{total / 1e9:.1f} GB, {memory}"
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cores": usable_cores(),
        "cpu_features": ", ".join(cpu_features()) or "none that are known",
        "memory": memory,
        "disk": f"{shutil.disk_usage('.').free / 1e9:.1f} GB free here",
    }


def _providers() -> list[str]:
    if not is_installed("onnxruntime"):
        return []
    import onnxruntime

    return list(onnxruntime.get_available_providers())
