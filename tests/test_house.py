"""The rooms of the package: each imports only rooms before it, and no file imports another in a circle."""

from __future__ import annotations

import ast
import functools
import pathlib
import types

import kfe_optax

ROOT = pathlib.Path(kfe_optax.__file__).parent
ROOMS = [
    "_jax",
    "polar",
    "initializers",
    "distributions",
    "_linalg",
    "_layers",
    "_marks",
    "_statistics",
    "_tracing",
    "losses",
    "_taps",
    "factors",
    "diagnostics",
    "_methods",
    "_wrappers",
    "contrib",
    "_aliases",
    "__init__",
    "experiments",
]


@functools.cache
def imports() -> dict[str, set[str]]:
    """{module: the modules of the package that it imports}, by dotted names behind `kfe_optax.`."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in ROOT.rglob("*.py")
    }
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                named = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for full in named:
                if full.startswith("kfe_optax."):
                    inside = full.removeprefix("kfe_optax.")
                    found[name].add(inside if inside in files else inside.rpartition(".")[0] or "__init__")
    return found


def test_rooms_import_one_way():
    upward = [
        f"{name} imports {other}"
        for name, others in imports().items()
        for other in others
        if ROOMS.index(name.split(".")[0]) < ROOMS.index(other.split(".")[0])
    ]
    assert not upward


def test_the_training_job_is_a_user():
    """It imports public names alone, as a program outside the package would."""
    private = [
        f"{name} imports {other}"
        for name, others in imports().items()
        if name.startswith("experiments")
        for other in others
        if other.startswith("_") and other != "__init__"
    ]
    assert not private


def test_no_file_imports_another_in_a_circle():
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in done:
            for other in imports().get(name, ()):
                visit(other, (*above, name))
            done.add(name)

    for name in imports():
        visit(name, ())


def test_public_names():
    """What `import *` gives is there, and is what the package's own names are."""
    for name in kfe_optax.__all__:
        assert hasattr(kfe_optax, name)
    public = [getattr(kfe_optax, name) for name in kfe_optax.__all__]
    for module in (member for member in public if isinstance(member, types.ModuleType)):
        assert all(hasattr(module, name) for name in getattr(module, "__all__", ())), module
        assert hasattr(module, "__all__") or not hasattr(module, "__path__"), module
    own = {name for name in vars(kfe_optax) if not name.startswith("_")}
    rooms = {path.stem for path in ROOT.iterdir()} - {"py"}
    assert own - rooms <= set(kfe_optax.__all__)


def _library() -> list[pathlib.Path]:
    return [path for path in ROOT.rglob("*.py") if "experiments" not in path.parts]


def test_no_file_is_long():
    assert not [str(path) for path in _library() if len(path.read_text().splitlines()) > 300]


def test_no_function_is_long():
    """Sixty lines at most of what a function does; its signature and its docstring may take what they need."""
    long = []
    for path in _library():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                if body and (body[-1].end_lineno or 0) - body[0].lineno >= 60:
                    long.append(f"{path.name}: {node.name}")
    assert not long
