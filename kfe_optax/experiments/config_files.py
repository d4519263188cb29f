"""Config files: finding one by path or name, and running it."""

from __future__ import annotations

import runpy
import traceback
from pathlib import Path

from ml_collections import ConfigDict

from kfe_optax.experiments.errors import ExperimentError


def load_config(name: str) -> ConfigDict:
    """Runs a config file and returns what its ``get_config()`` returns.

    ``name`` is the path of a Python file, or a bare name, which stands for ``configs/NAME.py`` in the current folder, beside
    the package, or inside it.
    """
    path = _find(name)
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        config = get_config() if callable(get_config) else None
    except SyntaxError as error:
        raise ExperimentError(f"'{path}' is not valid Python (line {error.lineno}: {error.msg}).") from error
    except Exception as error:  # whatever the file's own code raises
        frames = traceback.extract_tb(error.__traceback__)
        where = "".join([f" in line {frame.lineno}" for frame in frames if frame.filename == str(path)][-1:])
        words = " ".join(str(error).split())
        raise ExperimentError(f"'{path}' raises {type(error).__name__}{where}: {words}") from error
    words = "it needs a function get_config() that returns an ml_collections.ConfigDict, as the files in configs/ do"
    if not isinstance(config, ConfigDict):
        raise ExperimentError(f"'{path}' is not a config file; {words}.")
    return config


def _find(name: str) -> Path:
    # A clone that was installed in place keeps its configs beside the package, a wheel within it.
    here = Path(__file__)
    folders = (Path("configs"), here.parents[2] / "configs", here.parent / "configs")
    try:
        path = Path(name).expanduser()
        named = [folder / f"{name}.py" for folder in folders if path.name == name and not path.suffix]
        found = next((place for place in (path, *named) if place.is_file()), None)
    except (OSError, RuntimeError) as error:  # a name that is too long, the home of an unknown user
        raise ExperimentError(f"The config '{name}' cannot be looked for ({error}).") from error
    words = "give the path of a Python file with get_config(), such as configs/mnist_small.py in a clone of the repository"
    if found is None:
        raise ExperimentError(f"There is no config '{name}'; {words}.")
    return found
