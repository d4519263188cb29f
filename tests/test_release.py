"""What a release says of itself, and what it asks of others."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import kfe_optax as kfe

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_one_version():
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    headed = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited is not None
    assert headed is not None
    assert cited[1] == kfe.__version__
    assert headed[1] in (kfe.__version__, "Unreleased")


def test_licenses_of_dependencies():
    """Permissive ones: what is built with this package may be used as one likes."""
    extras = PROJECT["optional-dependencies"]
    requirements = [*PROJECT["dependencies"], *extras["experiments"], *extras["faces"]]
    for requirement in requirements:
        found = importlib.metadata.metadata(re.split(r"[<>=\[]", requirement)[0])
        words = [found.get("License-Expression"), found.get("License"), *(found.get_all("Classifier") or [])]
        said = " ".join(word.split("\n")[0] for word in words if word)
        assert re.search(r"Apache|BSD|MIT|matplotlib|Python Software Foundation", said), requirement
        assert not re.search(r"\bA?GPL", said), requirement
