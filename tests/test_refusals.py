"""The table of what is refused holds sentences of the library."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def strings(tree):
    """All strings of a module, with … for what is formatted into them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_sentences_are_those_of_the_library():
    files = [path for path in (ROOT / "kfe_optax").rglob("*.py") if "experiments" not in path.parts]
    known = "\n".join(s for path in files for s in strings(ast.parse(path.read_text(encoding="utf-8"))))
    rows = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/refusals.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) > 40
    # A layer's own name stands in the text or is formatted into it.
    missing = [row for row in rows if not all(part.strip() in known for part in row.split("…"))]
    assert not missing
