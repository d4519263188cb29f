"""Every planted fault still has its place in the library: whoever moves the code moves the fault."""

from __future__ import annotations

import pytest

from .faults import ROOT, Fault, read

FAULTS = read()


def test_at_least_forty_that_differ():
    assert len(FAULTS) >= 40
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_fault_has_its_place(fault):
    text = (ROOT / fault.file).read_text()
    assert fault.planted(text) != text
    assert fault.lines(text)


def test_a_fault_without_its_place_is_said():
    fault = Fault("a lost sign", "some.py", "x = -y\n", "x = y\n", "area")
    assert fault.planted("x = -y\n") == "x = y\n"
    with pytest.raises(ValueError, match=r"2 times:\nx = -y\nWhoever moves .* moves the fault"):
        fault.planted("x = -y\nx = -y\n")
    with pytest.raises(ValueError, match="is no Python"):
        Fault("a", "some.py", "x\n", "x =\n", "area").planted("x\n")


def test_the_statement_around_a_changed_line():
    text = "def f(x):\n    if x:\n        y = (\n            1,\n            2,\n        )\n    return y\n"
    assert Fault("a", "f.py", "            2,\n", "            3,\n", "area").lines(text) == {3, 4, 5, 6}
    assert Fault("a", "f.py", "    if x:\n", "    if not x:\n", "area").lines(text) == {2}
    added = Fault("a", "f.py", "    return y\n", "    y += 1\n    return y\n", "area")
    assert added.lines(text) == {7}
