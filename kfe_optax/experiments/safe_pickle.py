"""Reads a pickle of plain values and arrays, and runs none of the code that a pickle can call for.

A pickle is a program: it names functions anywhere in Python and has them called. Here only the few
names under which numpy's arrays are stored have a meaning, and what they mean are the classes of
this file, so that not even numpy's own unpickling sees what a file says about memory.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from typing import Any

import numpy as np

from kfe_optax.experiments.errors import ExperimentError

_MOST_TUPLES = 10_000
_NUMERIC = re.compile(r"[<>=|]?(b1|[ui][1248]|f[248])")


def read_dictionary(content: bytes, where: str) -> dict[str, Any]:
    """The dictionary in a pickle of any protocol, written by Python 2 or 3.

    Its values may be numbers, bytes, strings, lists, tuples, dictionaries and numeric arrays. Keys
    are given back as strings, whichever Python wrote them.

    Raises:
      ExperimentError: the pickle is damaged, holds no dictionary, or names anything else.

    Example::

        read_dictionary(Path("data_batch_1").read_bytes(), "'data_batch_1'")["data"].shape  # (10000, 3072)
    """
    try:
        _check_opcodes(content)
        found = _Reader(content, where).load()
    except ExperimentError:
        raise
    # Damaged bytes can raise whatever a value's construction raises.
    except Exception as error:
        raise ExperimentError(
            f"{where} is not a readable pickle of numbers, strings and arrays ({error}); fetch it again."
        ) from error
    if not isinstance(found, dict):
        raise ExperimentError(
            f"{where} is a pickle of a {type(found).__name__}; a dictionary with 'data' and 'labels' is "
            "expected: fetch it again."
        )
    return {_text(key): getattr(value, "array", value) for key, value in found.items()}


def _check_opcodes(content: bytes) -> None:
    """Raises where a few bytes would ask for much memory: data longer than the file, places in the memo far out."""
    tuples = 0
    # This reads the arguments, and raises where fewer bytes are left than one of them announces.
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        # A pickler numbers what it keeps from 0 or 1 on.
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= (argument or 0) <= count + 1:
            raise pickle.UnpicklingError(f"place {argument} in a memo of at most {count + 1}")
        tuples += opcode.name.startswith("TUPLE")
    # Python hashes a tuple within a tuple by recursion, and has no guard against depth there.
    if tuples > _MOST_TUPLES:
        raise pickle.UnpicklingError(f"{tuples} tuples")


def _text(value: object) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


class _StandIn:
    """What a name in a pickle stands for; without a ``__setstate__`` a pickle could set its attributes."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state for what has none")


class _ArrayClass(_StandIn):
    """``numpy.ndarray``, which a pickle only passes on."""

    __slots__ = ()


class _Kind(_StandIn):
    """``numpy.dtype``, for numbers only: objects would be addresses in memory."""

    __slots__ = ("dtype",)

    def __init__(self, code: str | bytes, align: object = False, copy: object = False):
        del align, copy
        name = _text(code)
        if not _NUMERIC.fullmatch(name):
            raise pickle.UnpicklingError(f"values of type '{name}'")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple) -> None:
        # (version, byte order, and the parts of a compound type, which are None here, ...)
        order = _text(state[1])
        if order not in ("<", ">", "=", "|") or any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("values of a compound type")
        self.dtype = self.dtype.newbyteorder(order)  # "|" keeps the order


class _Array(_StandIn):
    """``_reconstruct(ndarray, (0,), b"b")``: an empty array whose state fills it."""

    __slots__ = ("array",)

    def __init__(self, array_class: object, shape: object, code: object):
        del array_class, shape, code
        self.array: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, by_column, content = state
        values = np.frombuffer(content, kind.dtype)
        self.array = values.reshape(shape, order="F" if by_column else "C")


class _Flat(_Array):
    """``_frombuffer(content, dtype, shape, order)``: an array in a pickle of protocol 5."""

    __slots__ = ()

    def __init__(self, content: bytes | bytearray, kind: _Kind, shape: tuple, order: str):
        self.__setstate__((1, shape, kind, order == "F", content))


class _Encode(_StandIn):
    """``_codecs.encode(text, "latin1")``: bytes in a pickle of protocol 2 that Python 3 wrote.

    The same text is encoded once, however often a pickle asks.
    """

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: dict[int, tuple[str, bytes]] = {}

    def __call__(self, text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"bytes in the encoding '{encoding}'")
        if id(text) not in self._known:
            self._known[id(text)] = (
                text,
                text.encode("latin1"),
            )  # the text too, so that its id stays its own
        return self._known[id(text)][1]


# numpy 2 renamed its module 'core'; both names are found in files.
_ADMITTED: dict[tuple[str, str], type[_StandIn]] = {
    ("numpy", "ndarray"): _ArrayClass,
    ("numpy", "dtype"): _Kind,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.numeric", "_frombuffer"): _Flat,
    ("numpy._core.numeric", "_frombuffer"): _Flat,
    ("_codecs", "encode"): _Encode,
}


class _Reader(pickle.Unpickler):
    """An unpickler for which only the names above exist."""

    def __init__(self, content: bytes, where: str):
        # Python 2 made no difference between strings and bytes: its strings come back as bytes.
        super().__init__(io.BytesIO(content), encoding="bytes")
        self._where = where
        self._encode = _Encode()

    def find_class(self, module: str, name: str, /) -> type[_StandIn] | _Encode:
        if (module, name) not in _ADMITTED:
            raise ExperimentError(
                f"{self._where} is a pickle that asks for '{module}.{name}', which a data set does not need: "
                "it is not read; fetch the file again from where the data set is published."
            )
        found = _ADMITTED[module, name]
        return self._encode if found is _Encode else found
