"""Seconds and peak resident memory of a piece of work, and an allocator that gives memory back.

Times never enter an artifact.
"""

import ctypes
import gc
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

import psutil

_LARGE_BLOCK = 256 * 1024
_M_MMAP_THRESHOLD = -3


def give_back_large_blocks() -> None:
    """Make glibc return every freed block of 256 KiB or more to the system at once.

    Left alone it raises that size to 32 MiB as it goes and keeps what autograd frees: a training step was measured at
    3.2 GB so and at 1.9 GB with this, in the same time. No effect elsewhere.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)


class Meter:
    """Measures the `with` block: `seconds`, and `peak_bytes` of resident memory of this process.

    Linux keeps the high-water mark itself (VmHWM, reset through clear_refs); elsewhere memory is sampled every 20 ms.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.peak_bytes = 0

    def __enter__(self) -> "Meter":
        _give_back_freed_memory()
        self._start = time.monotonic()
        self._marked = _reset_high_water_mark()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        if not self._marked:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.monotonic() - self._start
        if self._marked:
            self.peak_bytes = _high_water_mark()
        else:
            self._stop.set()
            self._thread.join()

    def _sample(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(0.02):
            self.peak_bytes = max(self.peak_bytes, process.memory_info().rss)


def _give_back_freed_memory() -> None:
    """What an earlier stage freed must not count for this one: glibc keeps it until asked."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _high_water_mark() > 0


def _high_water_mark() -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    line = next((row for row in status.splitlines() if row.startswith("VmHWM:")), "VmHWM: 0")
    return int(line.split()[1]) * 1024
