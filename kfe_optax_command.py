"""The console script `kfe-optax`, outside the package: importing that takes seconds, in which Ctrl-C may come."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130  # the shell's status of a program that Ctrl-C ended


def main() -> int:
    """Runs a command of `kfe_optax.experiments.main` and returns its exit status; until it is imported, Ctrl-C ends with 130."""
    signal.signal(signal.SIGINT, _end)
    from kfe_optax.experiments.main import main as run

    return run()


def _end(number: int, frame: FrameType | None) -> NoReturn:
    # At once: JAX's import swallows an exception, or turns it into an error of its own.
    del number, frame
    with contextlib.suppress(Exception):
        os.write(2, b"kfe-optax: interrupted.\n")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
