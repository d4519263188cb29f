"""What a pickle may hold, and that nothing which it asks for is run."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from kfe_optax.experiments import safe_pickle
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.safe_pickle import read_dictionary

ARRAYS = {
    "bytes": np.arange(12, dtype=np.uint8).reshape(3, 4),
    "integers": np.arange(-3, 3),
    "other byte order": np.arange(5, dtype=">i4"),
    "floats": np.linspace(0, 1, 7, dtype=np.float32),
    "truths": np.array([True, False]),
    "columns": np.asfortranarray(np.arange(12).reshape(3, 4)),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_plain_values_come_back(protocol):
    plain = {
        "name": "one",
        "raw": b"\x00\xff",
        "labels": [1, 2],
        "pair": (1.5, None, True),
        "inner": {"a": 1},
    }
    found = read_dictionary(pickle.dumps(plain | ARRAYS, protocol), "it")
    assert {name: found[name] for name in plain} == plain
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def python2_pickle(array: np.ndarray, labels: list[int], numpy_core: bytes = b"numpy.core") -> bytes:
    """``{"data": array, "labels": labels}`` of bytes as Python 2 wrote it: protocol 2, strings as bytes."""

    def string(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    def whole(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    kind = b"cnumpy\ndtype\n" + string(b"u1") + whole(0) + whole(1) + b"\x87R"
    kind += b"(" + whole(3) + string(b"|") + b"NNN" + whole(-1) * 2 + whole(0) + b"tb"
    shape = whole(array.shape[0]) + whole(array.shape[1]) + b"\x86"
    empty = b"c" + numpy_core + b".multiarray\n_reconstruct\n"
    empty += b"cnumpy\nndarray\n" + whole(0) + b"\x85" + string(b"b") + b"\x87R"
    filled = empty + b"(" + whole(1) + shape + kind + b"\x89" + string(array.tobytes()) + b"tb"
    listed = b"](" + b"".join(map(whole, labels)) + b"e"
    return b"\x80\x02}(" + string(b"data") + filled + string(b"labels") + listed + b"u."


@pytest.mark.parametrize("numpy_core", [b"numpy.core", b"numpy._core"])
def test_a_pickle_of_python_2(numpy_core):
    array = np.arange(20, dtype=np.uint8).reshape(4, 5)
    content = python2_pickle(array, [3, 1, 2, 0], numpy_core)
    found = read_dictionary(content, "it")
    np.testing.assert_array_equal(found["data"], array)
    assert found["labels"] == [3, 1, 2, 0]
    # numpy itself reads it so: the bytes above are a pickle that the published files could be.
    if numpy_core == b"numpy._core":
        np.testing.assert_array_equal(pickle.loads(content, encoding="bytes")[b"data"], array)


class Calls:
    """An object that is pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, protocol):
    trace = tmp_path / "trace"
    content = pickle.dumps({"data": Calls(os.system, f"touch {trace}"), "labels": [0]}, protocol)
    with pytest.raises(ExperimentError, match=f"asks for '{os.name}.system', which a data set does not need"):
        read_dictionary(content, "it")
    assert not trace.exists()
    pickle.loads(content)  # without the guard it runs
    assert trace.exists()


@pytest.mark.parametrize(
    "value",
    [
        Calls(eval, "1"),
        Calls(getattr, "", "join"),
        Calls(np.load, "x"),
        Calls(np.fromfile, "x"),
        Path("x"),
        np.random.default_rng,
        ExperimentError,
        {1, 2}.__class__,
    ],
)
def test_every_other_name_is_refused(value):
    with pytest.raises(ExperimentError, match="is a pickle that asks for '.*'"):
        read_dictionary(pickle.dumps({"data": value}), "'file'")


@pytest.mark.parametrize(
    "value",
    [
        np.array([{}, None], object),  # its elements would be addresses
        np.array(["a"]),
        np.zeros(2, [("a", "u1"), ("b", "f4")]),
        np.zeros(2, "M8[s]"),
        np.zeros(2, np.complex64),
    ],
)
def test_arrays_of_other_than_numbers_are_refused(value):
    with pytest.raises(ExperimentError, match="not a readable pickle of numbers.*values of type"):
        read_dictionary(pickle.dumps({"data": value}, 4), "it")


def test_a_pickle_cannot_change_the_classes_that_stand_for_numpy():
    """The opcode b sets the attributes of whatever has no __setstate__; classes are on the stack too."""
    for module, name in safe_pickle._ADMITTED:
        state = b"(N}" + b"\x8c\x05array" + b"K\x01st"  # the pair (None, {"array": 1})
        content = b"\x80\x04" + f"c{module}\n{name}\n".encode() + state + b"b."
        with pytest.raises(ExperimentError, match="not a readable pickle"):
            read_dictionary(content, "it")
    assert not hasattr(safe_pickle._Kind, "array")


def test_damaged_pickles_are_one_sentence():
    content = pickle.dumps({"data": ARRAYS["bytes"], "labels": [0, 1, 2]}, 2)
    for end in range(0, len(content), 7):
        with pytest.raises(ExperimentError, match="it is not a readable pickle"):
            read_dictionary(content[:end], "it")
    # A changed byte gives a dictionary or a sentence, never another exception.
    refused = 0
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 0x41
        try:
            assert isinstance(read_dictionary(bytes(damaged), "it"), dict)
        except ExperimentError:
            refused += 1
    assert refused > len(content) / 2


@pytest.mark.parametrize(
    "body",
    [
        b"}r\xff\xff\xff\x7f",  # LONG_BINPUT, a memo of 2^31 places
        b"}p2147483647\n",  # the same in text
        b"]" * 10 + b"r\x00\x00\x00\x01",  # of 2^24
        b"\x8e" + struct.pack("<Q", 2**40) + b"abc",  # BINBYTES8
        b"\x96" + struct.pack("<Q", 2**40) + b"abc",  # BYTEARRAY8
        b"B" + struct.pack("<I", 2**31) + b"abc",  # BINBYTES
        b"\x8b" + struct.pack("<i", 2**31 - 1) + b"abc",  # LONG4
        b"})" + b"\x85" * 2_000_000 + b"Ns",  # a key of tuples within tuples, at whose hash Python crashes
    ],
)
def test_a_few_bytes_cannot_ask_for_much_memory(body):
    with pytest.raises(ExperimentError, match="not a readable pickle"):
        read_dictionary(b"\x80\x05" + body + b".", "it")


def test_a_text_is_encoded_once_however_often_a_pickle_asks():
    call = b"c_codecs\nencode\n"
    text = b"X" + struct.pack("<I", 1000) + b"a" * 1000 + b"q\x00"
    encode = call + b"h\x00X\x06\x00\x00\x00latin1\x86R"
    content = b"\x80\x02" + text + b"0}X\x01\x00\x00\x00k](" + encode * 3 + b"es."
    found = read_dictionary(content, "it")["k"]
    assert found == [b"a" * 1000] * 3
    assert found[0] is found[1] is found[2]
