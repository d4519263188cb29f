"""The API pages have every public name; the README is short, and its links lead somewhere."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import kfe_optax as kfe

ROOT = Path(__file__).parents[1]
MODULES = [getattr(kfe, name) for name in kfe.__all__ if isinstance(getattr(kfe, name), ModuleType)]
# Names without an underscore that are for the package's own use.
INTERNAL = {"kfe_optax.polar.checked", "kfe_optax.polar.checked_dtype"}


def documented() -> list[str]:
    pages = (page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs/api").glob("*.md")))
    return [name for page in pages for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE)]


def resolved(name: str) -> Any:
    found: Any = importlib.import_module("kfe_optax")
    for part in name.split(".")[1:]:
        found = getattr(found, part)
    return found


def members(module: ModuleType) -> list[str]:
    """The public functions and classes of a module of this package."""
    return [
        name
        for name, member in vars(module).items()
        if name in getattr(module, "__all__", [name])
        if not name.startswith("_")
        and callable(member)
        and getattr(member, "__module__", "").startswith("kfe_optax")
    ]


def test_every_public_name_is_in_the_api_pages():
    names = documented()
    assert len(names) == len(set(names))
    missing = [name for name in kfe.__all__ if f"kfe_optax.{name}" not in names]
    assert not missing, f"docs/api/ has no page with {', '.join(missing)}."


def test_every_member_of_a_public_module_is_in_the_api_pages():
    there = [resolved(name) for name in documented()]
    missing = [
        f"kfe_optax.{module.__name__.rpartition('.')[-1]}.{name}"
        for module in MODULES
        for name in members(module)
        if not any(getattr(module, name) is found for found in there)
    ]
    assert not set(missing) - INTERNAL


def test_the_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 200
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert len(links) > 20
    missing = [link for link in links if not (ROOT / link.partition("#")[0]).exists()]
    assert not missing
