"""The arrays of an ``.npz`` archive, each read only after its header has said how large it is."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

import numpy as np

from kfe_optax.experiments.dataset import check_size

_SUFFIX = ".npy"
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class Archive:
    """An open ``.npz``: the ``names`` of its arrays, and ``read(name)``.

    ``numpy.load`` allocates what a file says and reads on until memory ends. Here nothing is read that does not
    have the size it announces, or of which all together would exceed ``dataset.LARGEST``.

    Raises:
      ExperimentError: the arrays are too large.
      Exception: whatever damaged bytes, encryption or an unknown compression lead to.

    Example::

        with Archive(path) as archive:
            images = archive.read("x_train")
    """

    def __init__(self, path: Path):
        self._path = path
        self._zip = zipfile.ZipFile(path)
        self._bytes = 0
        self.names = tuple(
            name.removesuffix(_SUFFIX) for name in self._zip.namelist() if name.endswith(_SUFFIX)
        )

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *exception: object) -> None:
        self._zip.close()

    def read(self, name: str) -> np.ndarray:
        """One array; Python objects are refused, because reading them could run code."""
        member = self._zip.getinfo(name + _SUFFIX)
        with self._zip.open(member) as file:
            version = np.lib.format.read_magic(file)
            if version not in _HEADERS:
                raise ValueError(f"'{name}' has a header of version {version}")
            shape, by_column, dtype = _HEADERS[version](file)
            if dtype.hasobject:
                raise ValueError(f"'{name}' holds Python objects")
            if min(shape, default=0) < 0:
                raise ValueError(f"'{name}' has shape {shape}")
            size, held = math.prod(shape) * dtype.itemsize, member.file_size - file.tell()
            # Of bytes there will be four times as many as float32.
            self._bytes += max(held, size, 4 * math.prod(shape))
            check_size(self._bytes, f"'{self._path}' with its array '{name}'")
            if size != held:
                raise ValueError(f"'{name}' announces {size:,} bytes and holds {held:,}")
            content = file.read()
        return np.frombuffer(content, dtype, math.prod(shape)).reshape(shape, order="F" if by_column else "C")
