"""Control groups of Linux: those that may limit this process, in both versions.

    /proc/self/cgroup    the process's own groups: NUMBER:CONTROLLERS:PATH, of version 2 0::PATH
    /sys/fs/cgroup       where they are mounted; of version 1 a folder for each controller

A group is limited by those around it too. What is limited, and how, is said by ``cores`` and
``memory``.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from internvl_edge.files.reading import system_text

__all__ = ["CGROUPS", "OWN_CGROUPS", "own_groups"]

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def own_groups(
    controller: str, root: Path = CGROUPS, own: Path = OWN_CGROUPS
) -> tuple[tuple[int, Path], ...]:
    """List this process's control groups that may limit something, and those around them.

    In a container a group's path may be one of the host; the mount itself is then its own.

    Args:
        controller: what is limited: "cpu", "memory".
        root: where control groups are mounted.
        own: the file that names this process's groups; it is read at each call.

    Returns:
        Of each the version of control groups, and its folder, which need not be there.
    """
    return _groups(controller, root, system_text(own))


@lru_cache(maxsize=8)
def _groups(controller: str, root: Path, text: str) -> tuple[tuple[int, Path], ...]:
    """List the groups that a text names; paths take longer to make than the files to read."""
    groups: list[tuple[int, Path]] = []
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            mounts, version = [root], 2
        elif controller in controllers.split(","):
            mounts, version = list(dict.fromkeys((root / controllers, root / controller))), 1
        else:
            continue
        for mount in mounts:
            folder = mount / group.strip("/")
            around = (above for above in folder.parents if above.is_relative_to(mount))
            groups += ((version, each) for each in (folder, *around))
    return tuple(groups)
