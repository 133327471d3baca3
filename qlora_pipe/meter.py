"""Seconds and peak resident memory of a piece of work. Times never enter an artifact."""

import ctypes
import gc
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

import psutil


class Meter:
    """Measures the `with` block: `seconds`, and `peak_bytes` of resident memory of this process.

    Linux keeps the high-water mark itself (VmHWM, reset through clear_refs); elsewhere memory is sampled every 20 ms.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.peak_bytes = 0

    def __enter__(self) -> "Meter":
        release_memory()
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
        process, stopped = psutil.Process(), False
        while not stopped:
            self.peak_bytes = max(self.peak_bytes, process.memory_info().rss)
            stopped = self._stop.wait(0.02)


def release_memory() -> None:
    """Collect what is garbage and give freed memory back to the system: glibc keeps it until asked."""
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
