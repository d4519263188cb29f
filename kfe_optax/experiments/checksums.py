"""Checksums of the files in a folder, by which damage is found before anything that they hold is used."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

_NAME = "checksums.json"


def write_checksums(folder: Path) -> None:
    """Writes ``checksums.json`` for all files at or below ``folder``, as the last of them and at once."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    found = {path.relative_to(folder).as_posix(): _checksum(path) for path in files}
    fresh = folder / f"{_NAME}.new"
    fresh.write_text(json.dumps(found, indent=1), encoding="utf-8")
    fresh.replace(folder / _NAME)


def find_damage(folder: Path) -> str | None:
    """What is wrong with the files in ``folder``, in a few words; None where all are as they were written.

    Example::

        find_damage(workdir / "checkpoints" / "12")         # "'state/manifest.ocdbt' has changed"
    """
    try:
        expected = json.loads((folder / _NAME).read_text(encoding="utf-8")).items()
    except FileNotFoundError:
        return f"it has no '{_NAME}', with which its writing ends"
    except (OSError, ValueError, AttributeError):
        return f"its '{_NAME}' cannot be read"
    for name, checksum in expected:
        try:
            if _checksum(folder / name) != checksum:
                return f"'{name}' has changed since it was written"
        except OSError:
            return f"'{name}' is missing or cannot be read"
    return None


def _checksum(path: Path) -> int:
    return zlib.crc32(path.read_bytes())
