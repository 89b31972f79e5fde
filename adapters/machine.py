"""The machine that a run ran on."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """System, processor, cores that this process may use, bytes of memory, and GPUs where torch has found some."""
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": cores,
        "memory": int(psutil.virtual_memory().total),
        "python": platform.python_version(),
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        found["threads"] = int(torch.get_num_threads())
        if torch.cuda.is_available():
            found["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return found


def _processor() -> str:
    """The processor's name, as Linux tells it; elsewhere what Python knows."""
    table = Path("/proc/cpuinfo")
    if table.is_file():
        for line in table.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def said(found: dict[str, Any]) -> str:
    """The machine in one line."""
    gpus = ", ".join(map(str, found.get("gpus", ())))
    size = f"{found.get('memory', 0) / 2**30:.0f} GiB"
    line = f"{found.get('processor')}, {found.get('cores')} cores, {size}, {found.get('system')}"
    return f"{gpus}; {line}" if gpus else line
