"""Every Python block of the README runs, in order, in one namespace; what it prints is what the README shows."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.release

_README = Path(__file__).parents[1] / "README.md"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_the_blocks_of_the_readme_run():
    text = _README.read_text(encoding="utf-8")
    namespace: dict = {"__name__": "readme"}
    printed = ""
    for block in _BLOCK.finditer(text):
        language, source = block.groups()
        if language == "python":
            # Blank lines in front, so that a traceback points into the README.
            lines = text.count("\n", 0, block.start(2))
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile("\n" * lines + source, str(_README), "exec"), namespace)
            printed = output.getvalue()
        elif language == "text":
            assert source == printed
