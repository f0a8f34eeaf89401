"""Memory of this process: resident on the host, or allocated on a CUDA device."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch


class Memory:
    """Reads the present and the most memory, in bytes."""

    def __init__(self, device: str) -> None:
        self._on_device = device == "cuda"

    def now(self) -> int:
        """Return what is held."""
        return torch.cuda.memory_allocated() if self._on_device else _read_status("VmRSS")

    def peak(self) -> int:
        """Return the most that was held since `forget`."""
        if self._on_device:
            return torch.cuda.max_memory_allocated()
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return _read_status("VmHWM") or most

    def forget(self) -> None:
        """Begin anew with the peak, where the system can; elsewhere it stays that of the whole process."""
        if self._on_device:
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _read_status(field: str) -> int:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:  # this system has no /proc
        return 0
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return int(fields[field].split()[0]) * 1024
