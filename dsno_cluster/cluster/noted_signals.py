"""Signals that reach this process while handlers that are not ours may ignore them."""

from __future__ import annotations

import contextlib
import os
import signal


class NotedSignals:
    """Notes the signals that reach the process, whatever their Python handlers do, until `end`. For the main thread."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        for end in (self._read, self._write):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)

    def end(self) -> list[int]:
        """Stop, and return the signals noted."""
        signal.set_wakeup_fd(-1)
        noted = b""
        with contextlib.suppress(BlockingIOError):
            noted = os.read(self._read, 1024)
        os.close(self._read)
        os.close(self._write)
        return list(noted)
