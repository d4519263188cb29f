"""Turns Ctrl-C into a request that the training loop answers between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interruption:
    """While active, the first SIGINT or SIGTERM sets ``requested`` instead of raising.

    A step consumes its state's buffers before it hands back the new ones, so an exception between
    the two would leave nothing to save. A second signal raises ``KeyboardInterrupt`` at once, for
    a user who does not care to wait. Signals reach the main thread only; elsewhere this does
    nothing.

    Example::

        with Interruption() as interruption:
            while not interruption.requested:
                state, loss = step(state, batch)
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
