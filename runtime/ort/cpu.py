"""The instruction sets of this CPU, as far as they decide how products of few bits are computed."""

from __future__ import annotations

import platform
import re
from pathlib import Path

from internvl_edge.files.reading import system_text

__all__ = ["cpu_features", "cpuinfo", "products_saturate"]


def products_saturate() -> bool:
    """Tell whether sums of products of signed and unsigned bytes saturate at 16 bits here.

    x86 does without VNNI or AMX; where the system does not say, it is taken to.
    """
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return is_x86 and not {"avx_vnni", "avx512_vnni", "amx_int8"} & set(cpu_features())


def cpu_features() -> list[str]:
    """List the instruction sets that decide how fast products of 8 and 16 bits are."""
    known = r"avx2|avx_vnni|avx512f|avx512_vnni|avx512_bf16|avx512_fp16|amx_int8|amx_bf16|amx_fp16"
    flags = (cpuinfo("flags") or cpuinfo("Features") or "").split()
    return [flag for flag in flags if re.fullmatch(rf"{known}|asimddp|i8mm|bf16", flag)]


def cpuinfo(field: str) -> str | None:
    """Read the first value of a field of /proc/cpuinfo; None where there is none."""
    text = system_text(Path("/proc/cpuinfo"))
    match = re.search(rf"^{field}\s*: *(.*)$", text, re.MULTILINE)
    return match[1].strip() if match else None
