"""The console script `kfe-optax`, outside the package: importing that takes seconds, in which Ctrl-C may come."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130  # the shell's status of a program that Ctrl-C ended
_SHOW_CURSOR = b"\x1b[?25h"


def main() -> int:
    """Runs a command of `kfe_optax.experiments.main` and returns its exit status.

    Outside of an `Interruption`, SIGINT, SIGTERM and SIGHUP end it at once with a sentence and status 130: starting a
    program is importing and compiling, where libraries swallow an exception, or crash by it.
    """
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)):
        # ``nohup`` has a program ignore SIGHUP.
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)
    from kfe_optax.experiments.main import main as run

    return run()


def _end(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    with contextlib.suppress(Exception):  # a stream that is gone, or was being written to
        sys.stdout.flush()
        # A progress bar hides the cursor of a terminal.
        os.write(2, (_SHOW_CURSOR if sys.stderr.isatty() else b"") + b"kfe-optax: interrupted.\n")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
