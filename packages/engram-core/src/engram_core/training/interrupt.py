"""Ctrl-C between two steps instead of within one, so that nothing half done is counted."""

from __future__ import annotations

import signal
import threading
from types import FrameType

__all__ = ["DeferredInterrupt"]


class DeferredInterrupt:
    """While it is entered, the first Ctrl-C sets `requested`; a second one interrupts at once.

    Signals reach the main thread alone; entered elsewhere it does nothing.
    """

    def __init__(self) -> None:
        """Nothing is requested yet."""
        self.requested = False
        self._in_charge = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> DeferredInterrupt:  # noqa: PYI034 - typing.Self is younger than Python 3.10
        """Take over Ctrl-C."""
        if self._in_charge:
            self._before = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(self, *details: object) -> None:
        """Give it back."""
        if self._in_charge:
            signal.signal(signal.SIGINT, self._before)

    def _hear(self, _number: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
