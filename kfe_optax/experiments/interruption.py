"""Turns Ctrl-C into a request that the training loop answers between two steps."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Generator
from types import FrameType
from typing import Any, NoReturn

_SHOW_CURSOR = b"\x1b[?25h"
INTERRUPTED = 130  # the shell's status of a program that Ctrl-C ended

# What ends a program: Ctrl-C, a scheduler, a terminal that is closed (which Windows does not have).
_SIGNALS = (signal.SIGINT, signal.SIGTERM, *filter(None, [getattr(signal, "SIGHUP", None)]))


class Interruption:
    """While active, the first SIGINT, SIGTERM or SIGHUP sets ``requested`` instead of raising.

    A step consumes its state's buffers before it hands back the new ones, so an exception between
    the two would leave nothing to save. A second signal raises ``KeyboardInterrupt`` at once, for
    a user who does not care to wait, but not within ``deferred()``. Signals reach the main thread
    only; elsewhere this does nothing.

    Example::

        with Interruption() as interruption:
            while not interruption.requested:
                state, loss = step(state, batch)
    """

    _deferring = False

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if not _ignored(number):
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Generator[None, None, None]:
        """Lets no signal raise inside, so that a checkpoint is written to its end."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.requested and not self._deferring:
            raise KeyboardInterrupt
        self.requested = True


def end_at_signals() -> None:
    """From now on SIGINT, SIGTERM and SIGHUP end the program at once with a sentence, but in an ``Interruption``.

    Starting a program is importing and compiling, where libraries swallow an exception, or crash by it.
    """
    for number in _SIGNALS:
        if not _ignored(number):
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    with contextlib.suppress(Exception):  # a stream that is gone, or was being written to
        sys.stdout.flush()
        # A progress bar hides the cursor of a terminal.
        os.write(2, (_SHOW_CURSOR if sys.stderr.isatty() else b"") + b"kfe-optax: interrupted.\n")
    os._exit(INTERRUPTED)


def _ignored(number: int) -> bool:
    """Whether it is a SIGHUP that ``nohup`` has the program ignore."""
    return number not in (signal.SIGINT, signal.SIGTERM) and signal.getsignal(number) == signal.SIG_IGN
