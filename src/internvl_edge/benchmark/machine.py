"""The machine, its software and how busy it was: a reader needs them to compare figures."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from internvl_edge._version import __version__
from internvl_edge.files.cores import usable_cores
from internvl_edge.files.memory import total_memory
from internvl_edge.files.packages import MEASURED_WITH, versions
from internvl_edge.files.reading import system_text
from internvl_edge.runtime.gpu.probe import gpus
from internvl_edge.runtime.ort.cpu import cpu_features, cpuinfo

__all__ = ["environment", "gpu_nbytes", "load_warning"]

CLOCK = Path("/sys/devices/system/cpu/cpu0/cpufreq")  # of the first core


def environment() -> dict[str, Any]:
    """Describe the machine and its software; None where the system does not say."""
    return {
        "internvl_edge": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cpu_features": cpu_features(),
        "cores_usable": usable_cores(),
        "cores_online": os.cpu_count(),
        "clock_mhz": _clock_mhz(),
        "governor": system_text(CLOCK / "scaling_governor") or None,
        "memory_bytes": total_memory(),
        "load_average": _load_average(),
        "gpus": [gpu.name for gpu in gpus()],
        "packages": versions(MEASURED_WITH),
    }


def load_warning() -> str | None:
    """Say that other work on the machine makes every figure worse; None where there is none."""
    load, cores = _load_average(), usable_cores()
    if load is None or load <= cores:
        return None
    return (
        f"warning: other work is under way, a load of {load:.1f} on {cores} core(s): figures will "
        "be worse than this machine's; wait until it is idle"
    )


def gpu_nbytes() -> int | None:
    """Return all the memory of the first NVIDIA GPU; None where there is none."""
    return next((gpu.memory_nbytes for gpu in gpus() if gpu.index == 0), None)


def _load_average() -> float | None:
    """Count processes that ran or waited to, over the last minute: others disturb figures."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def _cpu_model() -> str | None:
    return cpuinfo("model name") or platform.processor() or None


def _clock_mhz() -> float | None:
    """Read the present clock of the first core."""
    if khz := system_text(CLOCK / "scaling_cur_freq"):
        return float(khz) / 1e3
    mhz = cpuinfo("cpu MHz")
    return None if mhz is None else float(mhz)
