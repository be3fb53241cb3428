"""How many CPUs this process may use: those it may run on, and what a container's quota gives it.

In a container the host's cores are all to be seen, and PyTorch takes a thread for each; those
beyond the quota are stopped for most of every period, and the others wait for them.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import NamedTuple


class Cpus(NamedTuple):
    """CPUs of the machine and of this process.

    Attributes:
        machine: that there are.
        allowed: that the process may run on (its affinity).
        quota: of whose time it is given; `None`: no control group limits it.
    """

    machine: int
    allowed: int
    quota: float | None

    @property
    def usable(self) -> int:
        """Threads that can compute at once; a quota is rounded up."""
        quota = self.allowed if self.quota is None else max(1, math.ceil(self.quota))
        return min(self.allowed, quota)


def of_process(root: str | os.PathLike[str] = "/") -> Cpus:
    """CPUs of this process.

    Args:
        root: where `proc` and `sys` are.
    """
    machine = os.cpu_count() or 1
    affinity = getattr(os, "sched_getaffinity", None)
    allowed = machine if affinity is None else len(affinity(0))
    return Cpus(machine, allowed, cgroup_quota(Path(root)))


def cgroup_quota(root: Path) -> float | None:
    """The smallest CPU quota of the process's control groups, of version 1 or 2, in CPUs.

    A container sees its own group as the root of what is mounted, so that groups are looked up both
    by their path and there.
    """
    quotas = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        if line.count(":") < 2:
            continue
        _, controllers, path = line.split(":", 2)
        folder = root / "sys/fs/cgroup"
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = [folder] if not controllers else [folder / controllers, folder / "cpu"]
        mounts += [folder / "unified"] if not controllers else []
        for mount in mounts:
            group = mount / path.lstrip("/")
            # What an outer group has left bounds the inner ones.
            for place in (group, *group.parents):
                if place == mount or mount in place.parents:
                    quotas.append(_quota_of(place))
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_of(group: Path) -> float | None:
    """Quota over period of one control group, where it has both."""
    written = _text(group / "cpu.max").split()
    if not written:
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        written = [word for name in names for word in _text(group / name).split()]
    try:
        quota, period = map(int, written)
    except ValueError:  # "max", or no such file
        return None
    return quota / period if quota > 0 and period > 0 else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
