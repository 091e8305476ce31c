"""What a figure was measured on."""

import os
import platform
from pathlib import Path


def describe_cpu() -> str:
    """Cores that this process may use, and the processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} x {names[0] if names else platform.machine()}"
