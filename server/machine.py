"""What this machine has: memory."""

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup/memory.max")
"""Where a container of Linux finds its limit: a number, or `max`."""


def physical_memory(cgroup: Path = CGROUP) -> int | None:
    """Bytes of memory that this process may hope for: the machine's, or its container's. None where nobody says."""
    if not hasattr(os, "sysconf"):  # Windows
        return None
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = int(cgroup.read_text())
    except (OSError, ValueError):
        return machine
    return min(machine, limit)
