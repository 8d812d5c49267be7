"""The one probe for NVIDIA's GPUs: how many there are, and what their driver says of each.

Asks the driver's own library through ``ctypes``, so that no CUDA package is needed. Without a
driver there are no GPUs: nothing here raises, or starts work on a GPU.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import Any

__all__ = ["Gpu", "cuda_driver", "cuda_version", "gpu_count", "gpus"]

NAME_NBYTES = 256
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_…


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU, as its driver describes it."""

    index: int  # of ``cuda:INDEX``
    name: str
    sm: int  # compute capability, 90 for 9.0
    memory_nbytes: int  # all of it, free or not


def gpus() -> list[Gpu]:
    """List the GPUs that the driver shows this process and describes."""
    driver = cuda_driver()
    described = [_described(driver, index) for index in range(gpu_count())]
    return [gpu for gpu in described if gpu is not None]


def gpu_count() -> int:
    """Count the GPUs that the driver shows this process; 0 without a driver."""
    driver, count = cuda_driver(), ctypes.c_int()
    if driver is None or driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def cuda_version() -> str | None:
    """Return the newest CUDA that the driver supports, such as "13.0"; None without a driver."""
    driver, version = cuda_driver(), ctypes.c_int()
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def cuda_driver() -> Any:
    """Load the driver's library; None where there is none."""
    try:
        return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return None


def _described(driver: Any, index: int) -> Gpu | None:
    device, name = ctypes.c_int(), ctypes.create_string_buffer(NAME_NBYTES)
    major, minor, nbytes = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    failed = (
        driver.cuDeviceGet(ctypes.byref(device), index)
        or driver.cuDeviceGetName(name, NAME_NBYTES, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), CAPABILITY_MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), CAPABILITY_MINOR, device)
        or driver.cuDeviceTotalMem_v2(ctypes.byref(nbytes), device)
    )
    if failed:
        return None
    return Gpu(
        index=index,
        name=name.value.decode(),
        sm=10 * major.value + minor.value,
        memory_nbytes=nbytes.value,
    )
