"""What a reader needs to compare figures: the machine, its software, and how busy it was."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from internvl_edge._version import __version__
from internvl_edge.runtime.gpu.probe import gpus
from internvl_edge.runtime.ort.cpu import cpu_features, cpuinfo

__all__ = ["environment", "gpu_nbytes"]

PACKAGES = (
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-bindings",
    "openvino",
    "torch",
)


def environment() -> dict[str, Any]:
    """What a reader needs to compare figures; None where the system does not say."""
    return {
        "internvl_edge": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cpu_features": cpu_features(),
        "cores_usable": _usable_cores(),
        "cores_online": os.cpu_count(),
        "clock_mhz": _clock_mhz(),
        "governor": _first_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "memory_bytes": _memory_bytes(),
        "load_average": _load_average(),
        "gpus": _gpus(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def gpu_nbytes() -> int | None:
    """All the memory of the first NVIDIA GPU, as its driver says; None where there is none."""
    return next((gpu.memory_nbytes for gpu in gpus() if gpu.index == 0), None)


def _load_average() -> float | None:
    """Processes that ran or waited to, over the last minute: above 0, figures were disturbed."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def _gpus() -> list[str]:
    """Names of NVIDIA's GPUs, from what its driver shows under /proc."""
    found = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        match = re.search(r"^Model:\s*(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        found.append(match[1].strip() if match else path.parent.name)
    return found


def _cpu_model() -> str | None:
    return cpuinfo("model name") or platform.processor() or None


def _clock_mhz() -> float | None:
    """The clock of the first core, now."""
    khz = _first_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")
    if khz is not None:
        return float(khz) / 1e3
    mhz = cpuinfo("cpu MHz")
    return None if mhz is None else float(mhz)


def _usable_cores() -> int | None:
    affinity = getattr(os, "sched_getaffinity", None)  # not everywhere
    return os.cpu_count() if affinity is None else len(affinity(0))


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _first_line(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
