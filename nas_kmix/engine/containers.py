"""The control groups of this process, by which containers limit memory and CPUs. Only Linux has them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

GROUPS, MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def control_groups(controller: str, groups: Path = GROUPS, mount: Path = MOUNT) -> Iterator[tuple[int, Path]]:
    """The folders of the groups that limit what `controller` counts, innermost first, each with its version, 1 or 2."""
    with suppress(OSError, ValueError):
        for line in groups.read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers == "" or controller in controllers.split(","):
                root = mount / controllers
                group = root / name.strip("/")
                for folder in (group, *group.parents):
                    if folder.is_relative_to(root):
                        yield 1 if controllers else 2, folder


def cpu_quota(groups: Path = GROUPS, mount: Path = MOUNT) -> float:
    """How many CPUs the groups let this process use at once; infinite without a limit."""
    least = math.inf
    for version, folder in control_groups("cpu", groups, mount):
        with suppress(OSError, ValueError):  # no limit: there is no such file, or `max` in it
            if version == 2:
                quota, period = map(int, (folder / "cpu.max").read_text().split())
            else:
                quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            if quota > 0:
                least = min(least, quota / period)
    return least
