"""Every block of Python of the README and of `docs/` runs, in order, in one namespace a page; what it prints is what is shown.

A page that says it goes on from Getting started has the names of that page, whose blocks have run once.
"""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
START = ROOT / "docs/getting-started.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NEEDS = {"docs/how-to/equinox.md": "equinox"}

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def has_blocks(page: Path) -> bool:
    return any(language == "python" for language, _ in _BLOCK.findall(page.read_text(encoding="utf-8")))


def run(page: Path, namespace: dict[str, Any]) -> None:
    """Runs the blocks of a page; a block of text behind them is what the last one printed."""
    text = page.read_text(encoding="utf-8")
    printed = ""
    for block in _BLOCK.finditer(text):
        language, source = block.groups()
        if language == "python":
            # Blank lines in front, so that a traceback points into the page.
            lines = text.count("\n", 0, block.start(2))
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile("\n" * lines + source, str(page), "exec"), namespace)
            printed = output.getvalue()
        elif language == "text":
            assert source == printed


@pytest.fixture(scope="module")
def started() -> tuple[dict[str, Any], dict[str, Any]]:
    """The namespace of Getting started, whose functions look their names up in it, and what stood in it at the end."""
    namespace: dict[str, Any] = {"__name__": "documentation"}
    run(START, namespace)
    return namespace, dict(namespace)


@pytest.mark.slow
@pytest.mark.release
@pytest.mark.parametrize("page", [page for page in PAGES if has_blocks(page)], ids=name_of)
def test_the_blocks_of_a_page_run(page, started):
    pytest.importorskip(NEEDS.get(name_of(page), "jax"))
    namespace, names = started
    if page == START:
        return
    if "go on from [Getting started]" in page.read_text(encoding="utf-8"):
        namespace.clear()
        namespace.update(names)
    else:
        namespace = {"__name__": "documentation"}
    run(page, namespace)
