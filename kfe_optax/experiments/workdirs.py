"""The folder of a command: made, and held by one process at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import IO

from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.parallel import any_process, writes

try:
    import fcntl
except ImportError:  # not on Windows, where nothing is locked
    fcntl = None


@contextlib.contextmanager
def claimed(workdir: str | Path, command: str) -> Generator[Path, None, None]:
    """Makes the folder that receives the files of a command, and keeps other processes out of it.

    The file ``<command>.run`` in it is what is locked. Of several processes of one run the first does all this.
    """
    lock, refusal, path = contextlib.nullcontext(), None, Path(workdir)
    try:
        path = path.expanduser()
        path.mkdir(parents=True, exist_ok=True)
        if writes():
            lock = _locked(path / f"{command}.run")
    except BlockingIOError:
        words = f"'{path}' is in use by another run of '{command}'"
        refusal = ExperimentError(f"{words}; wait for its end, or choose another --workdir.")
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        refusal = ExperimentError(f"Cannot write to --workdir '{workdir}' ({reason}); choose another.")
    # Before the first process has looked, no other one may make a file there.
    if any_process(refusal is not None):
        raise refusal or ExperimentError(f"The first process cannot use --workdir '{workdir}'.")
    with lock:
        yield path


def _locked(path: Path) -> IO[str]:
    """The file, open and locked for as long as it stays open."""
    file = path.open("a", encoding="utf-8")
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise
    except OSError:
        pass  # a file system without locks
    return file
