"""The planted faults: each a wrong meaning, as a replacement of a few lines of one file."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import hashlib
import pathlib
import tomllib

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = pathlib.Path(__file__).parent / "faults"


@dataclasses.dataclass(frozen=True)
class Fault:
    """Whole lines `old`, which stand once in `file`, become `new`."""

    name: str
    file: str
    old: str
    new: str
    area: str

    @property
    def identity(self) -> str:
        """Changes with the fault, so that an old result is not taken for that of another replacement."""
        return hashlib.sha256("\0".join((self.name, self.file, self.old, self.new)).encode()).hexdigest()[:16]

    def planted(self, text: str) -> str:
        """The text of the file with the fault in it.

        Raises:
          ValueError: `old` does not stand in it exactly once, or what comes of it is no Python.
        """
        if (found := text.count(self.old)) != 1:
            raise ValueError(
                f"The fault {self.name!r} belongs where this stands in {self.file}, which has it {found} times:\n"
                f"{self.old}Whoever moves or changes that code moves the fault (tests/planted_faults/faults/{self.area}.toml)."
            )
        changed = text.replace(self.old, self.new)
        try:
            ast.parse(changed)
        except SyntaxError as error:
            raise ValueError(f"With the fault {self.name!r}, {self.file} is no Python: {error}") from None
        return changed

    def lines(self, text: str) -> set[int]:
        """The numbers, from one, of the lines of the sound file whose statements the fault changes."""
        first = text[: text.index(self.old)].count("\n") + 1
        old, new = self.old.splitlines(), self.new.splitlines()
        changed: set[int] = set()
        for tag, start, stop, _, _ in difflib.SequenceMatcher(a=old, b=new, autojunk=False).get_opcodes():
            if tag in ("replace", "delete"):
                changed |= set(range(first + start, first + stop))
        # Lines that are only added are executed where their neighbors are.
        changed = changed or set(range(first, first + len(old)))
        return {line for number in changed for line in _statement(ast.parse(text), number)}


def _statement(tree: ast.Module, number: int) -> set[int]:
    """The lines of the innermost statement that a line belongs to; of a compound one its head."""
    inside = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.stmt) and node.lineno <= number <= (node.end_lineno or node.lineno)
    ]
    if not inside:
        return {number}
    # Of nested statements, the one that begins last.
    node = max(inside, key=lambda node: (node.lineno, node.col_offset))
    body = getattr(node, "body", None)
    last = body[0].lineno - 1 if body else node.end_lineno
    return set(range(node.lineno, max(node.lineno, last or node.lineno) + 1))


def read() -> list[Fault]:
    """All faults, area by area."""
    return [
        Fault(area=path.stem, **entry)
        for path in sorted(FOLDER.glob("*.toml"))
        for entry in tomllib.loads(path.read_text())["fault"]
    ]
