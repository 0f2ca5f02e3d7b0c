"""Progress of a conversion: one line a phase, its time, and the peak memory so far."""

import resource
import sys
import threading
import time
from types import TracebackType
from typing import TextIO

_REFRESH_S = 1.0


class Progress:
    """Tells what is being done. On a terminal the running phase counts its seconds.

    Use as a context manager; call it with the name of each phase as it starts.
    """

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self.timings_s: dict[str, float] = {}
        self._stream = sys.stderr if stream is None else stream
        self._quiet = quiet
        self._phase = ""
        self._started = 0.0
        self._detail = ""
        self._count = 0
        self._done = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> "Progress":
        if self._stream.isatty() and not self._quiet:
            threading.Thread(target=self._refresh, daemon=True).start()
        return self

    def __call__(self, phase: str) -> None:
        """Start a phase; the one before it ends."""
        self._finish_phase()
        with self._lock:
            self._count += 1
            self._phase, self._detail, self._started = phase, "", time.monotonic()
        if not self._quiet and not self._stream.isatty():
            self._stream.write(f"{self._prefix()} ...\n")
            self._stream.flush()

    def detail(self, text: str) -> None:
        """Say more about the running phase."""
        with self._lock:
            self._detail = text

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._finish_phase()
        elif self._stream.isatty() and not self._quiet:
            self._stream.write("\n")
        self._done.set()

    def _prefix(self) -> str:
        return f"{self._count:2d}. {self._phase}"

    def _finish_phase(self) -> None:
        with self._lock:
            if not self._phase:
                return
            seconds = time.monotonic() - self._started
            self.timings_s[self._phase] = round(seconds, 2)
            if not self._quiet:
                start = "\r\x1b[K" if self._stream.isatty() else ""
                peak = f"peak {peak_rss_bytes() / 1e9:.1f} GB"
                self._stream.write(f"{start}{self._prefix()}: {seconds:.1f} s, {peak}\n")
                self._stream.flush()
            self._phase = ""

    def _refresh(self) -> None:
        while not self._done.wait(_REFRESH_S):
            with self._lock:
                if self._phase:
                    seconds = time.monotonic() - self._started
                    detail = f" ({self._detail})" if self._detail else ""
                    self._stream.write(f"\r\x1b[K{self._prefix()}{detail} {seconds:.0f} s")
                    self._stream.flush()


def peak_rss_bytes() -> int:
    """The peak resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
