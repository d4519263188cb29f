"""The folder of a command: made, held by one process at a time, and never with another's files overwritten."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import IO

from kfe_optax.experiments.errors import ExperimentError, require
from kfe_optax.experiments.parallel import any_process, writes

try:
    import fcntl
except ImportError:  # not on Windows, where nothing is locked
    fcntl = None


@contextlib.contextmanager
def claimed(workdir: str | Path, command: str, files: Sequence[str]) -> Generator[Path, None, None]:
    """Makes the folder that receives the ``files`` of a command, and keeps other processes out of it.

    The file ``<command>.run`` in it is what is locked, and the mark of a folder whose ``files`` a run of the
    command has written: elsewhere there may be none of these names. Of several processes of one run the first
    does all this.
    """
    mark, refusal, path = contextlib.nullcontext(), None, Path(workdir)
    try:
        path = path.expanduser()
        path.mkdir(parents=True, exist_ok=True)
        if writes():
            mark = _marked(path, command, files)
    except ExperimentError as error:
        refusal = error
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        refusal = ExperimentError(f"Cannot write to --workdir '{workdir}' ({reason}); choose another.")
    # Before the first process has looked, no other one may make a file there.
    if any_process(refusal is not None):
        raise refusal or ExperimentError(f"The first process cannot use --workdir '{workdir}'.")
    with mark:
        yield path


def _marked(path: Path, command: str, files: Sequence[str]) -> IO[str]:
    """The mark, open and locked for as long as it stays open."""
    mark = path / f"{command}.run"
    foreign = [name for name in files if os.path.lexists(path / name)]
    words = f"'{path}' holds '{', '.join(foreign)}' and no '{mark.name}', the mark of a run of '{command}'"
    advice = "another program's file would be overwritten; choose another --workdir"
    require(not foreign or mark.exists(), f"{words}: {advice}.")
    file = mark.open("a", encoding="utf-8")
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        words = f"'{path}' is in use by another run of '{command}' (process {mark.read_text(encoding='utf-8').strip()})"
        raise ExperimentError(f"{words}; wait for its end, or choose another --workdir.") from error
    except OSError:
        pass  # a file system without locks
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file
