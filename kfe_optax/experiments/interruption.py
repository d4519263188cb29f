"""Turns Ctrl-C into a request that the training loop answers between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

INTERRUPTED = 130  # the shell's status of a program that Ctrl-C ended


class Interruption:
    """While active, the first SIGINT, SIGTERM or SIGHUP sets ``requested`` instead of raising.

    A step consumes its state's buffers before it hands back the new ones, so an exception between
    the two would leave nothing to save. A second signal does what it did before, for a user who does not care to
    wait: the last checkpoint stands. Signals reach the main thread only; elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        # What ends a program: Ctrl-C, a scheduler, a terminal that is closed (which Windows does not have, and
        # which ``nohup`` has a program ignore).
        numbers = [signal.SIGINT, signal.SIGTERM]
        closed = getattr(signal, "SIGHUP", None)
        if closed is not None and signal.getsignal(closed) != signal.SIG_IGN:
            numbers.append(closed)
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.requested = True
        self.__exit__()
