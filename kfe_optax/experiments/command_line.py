"""The command line: its flags, its help, and which function each command calls."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags
from rich.console import Console

from kfe_optax.experiments.config_files import load_config
from kfe_optax.experiments.errors import ExperimentError, require
from kfe_optax.experiments.interruption import INTERRUPTED
from kfe_optax.experiments.optimizers import METHODS
from kfe_optax.experiments.options import descriptions
from kfe_optax.experiments.schedules import schedule

_HELP = """\
usage: kfe-optax COMMAND --config=FILE [--workdir=FOLDER] [--resume] [--config.FIELD=VALUE ...]

Trains networks with K-FAC, EKFAC and their relatives on real images and texts.

commands
  train      train one optimizer: records, checkpoints, a final evaluation
  compare    train several optimizers from the same start, over seeds if you like; a figure and a table
  layers     print the layers that the library finds in the model
  sweep      search an optimizer's settings; 'kfe-optax sweep --help' explains it
  diagnose   train and measure how far every factorization is from a layer's exact Fisher block;
             'kfe-optax diagnose --help' explains it

flags
  --config=FILE           a Python file with get_config(); a bare name stands for configs/NAME.py
  --config.FIELD=VALUE    override a field of the config, as often as you like
  --workdir=FOLDER        where results go; a folder in runs/ by default
  --resume                (train, sweep) continue what is in --workdir
  --help                  this text; with --config also that config's fields and values, and what each
                          option of its optimizers is

examples
  kfe-optax compare --config=mnist_small
  kfe-optax compare --config=mnist_small --config.compare.budget="30 seconds" --config.compare.seeds=5
  kfe-optax train --config=mnist_autoencoder --config.data_dir=data/mnist --config.optimizer=kfac
  A number becomes a schedule when a part of one is set:
      --config.kfac.momentum.kind=linear --config.kfac.momentum.end=0.5
"""
# Where the results of a command go by default.
_FOLDERS = {
    "train": "{name}-{optimizer}",
    "compare": "{name}",
    "layers": "",
    "sweep": "{name}-{optimizer}-sweep",
    "diagnose": "{name}-diagnose",
}
_RESUMABLE = ("train", "sweep")
_HELP_FLAGS = ("-h", "-help", "--help")


def run_command(arguments: list[str]) -> int:
    """Runs the command that ``arguments`` describe and returns its exit status."""
    console = Console()
    # Orbax reports every file that it writes, and every error with its stack, which here becomes a sentence.
    absl_logging.set_verbosity(absl_logging.FATAL)
    others = [argument for argument in arguments if argument not in _HELP_FLAGS]
    if others != arguments or not others:
        _print_help(*_without_config_file(others))
        return 2 if others == arguments else 0
    command, config, workdir, resume = _parse(others)
    if command == "layers":
        from kfe_optax.experiments.data import load
        from kfe_optax.experiments.job import make_layers

        print(make_layers(config, load(config)))
        return 0
    if command == "train":
        from kfe_optax.experiments.parallel import join_processes, writes

        join_processes(config)
        console = console if writes() else Console(quiet=True)
    folder = Path("runs") / _FOLDERS[command].format(name=config.name, optimizer=config.optimizer)
    folder, options = Path(workdir or folder), {"resume": resume} if command in _RESUMABLE else {}
    outcome = _run_of(command)(config, folder, console=console, **options)
    if not getattr(outcome, "interrupted", False):
        return 0
    words = "the same command with --resume continues from" if options else "what was measured is in"
    console.print(f"Interrupted; {words} '{folder}'.", highlight=False, soft_wrap=True)
    return INTERRUPTED


def _run_of(command: str) -> Callable[..., Any]:
    # Imported late, so that --help and a mistyped flag do not wait for Orbax and Matplotlib.
    return getattr(importlib.import_module(f"kfe_optax.experiments.{command}"), command)


def _print_help(name: str, words: list[str]) -> None:
    print(_HELP, end="")
    for command in {"sweep", "diagnose"} & set(words):
        print(f"\n{command}\n{inspect.getdoc(_run_of(command))}")
    if name:
        config = load_config(name)
        print(f"\nthe fields of this config\n{config}")
        for optimizer in sorted(METHODS.keys() & set(config)):
            known = descriptions(METHODS[optimizer].make)
            lines = [f"  {field:24}{known.get(field, '')}" for field in config[optimizer]]
            print(f"\n--config.{optimizer}.…", *lines, sep="\n")


def _parse(arguments: list[str]) -> tuple[str, ConfigDict, str, bool]:
    """The command, the config with its overrides, ``--workdir`` and ``--resume``."""
    name, arguments = _without_config_file(arguments)
    config = load_config(name) if name else None
    # Flags of our own, not absl's global ones, so that a program can run any number of commands.
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", "", "", flag_values=values)
    flags.DEFINE_bool("resume", False, "", flag_values=values)
    program = ["kfe-optax", *arguments]
    try:
        if config is not None:
            _make_schedules(config, arguments)
            # The definition already reads the overrides, to learn their types.
            config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=program)
        words = values(program)[1:]
    except (AttributeError, KeyError) as error:
        advice = "'kfe-optax --help --config=...' prints the fields"
        words = f"A --config.FIELD flag names a field that the config does not have: {_one_line(error)}"
        raise ExperimentError(f"{words}; {advice}.") from error
    except (flags.Error, TypeError, ValueError) as error:
        raise ExperimentError(f"{_one_line(error)}.") from error
    given = f"Name one command of {', '.join(_FOLDERS)} (given: {' '.join(words) or 'none'})"
    require(len(words) == 1 and words[0] in _FOLDERS, f"{given}; 'kfe-optax --help' shows examples.")
    command = words[0]
    if config is None:
        raise ExperimentError(f"Name a config, as in 'kfe-optax {command} --config=configs/mnist_small.py'.")
    belongs = f"--resume belongs to 'train' and 'sweep', not to '{command}'."
    require(not values.resume or command in _RESUMABLE, belongs)
    return command, config, values.workdir, values.resume


def _make_schedules(config: ConfigDict, arguments: list[str]) -> None:
    """A number of which a flag names a part (--config.kfac.momentum.kind=linear) becomes a schedule that starts from it."""
    for argument in arguments:
        named = re.match(rf"--?config\.(\w+)\.(\w+)\.({'|'.join(schedule(0.0))})=", argument)
        own = config.get(named[1]) if named else None
        if named and isinstance(own, ConfigDict) and isinstance(own.get(named[2], ""), float | int | None):
            with own.ignore_type():
                own[named[2]] = schedule(own[named[2]] or 0.0)


def _without_config_file(arguments: list[str]) -> tuple[str, list[str]]:
    """The value of ``--config``, which decides which ``--config.FIELD`` flags there are, and the other arguments."""
    name, others, remaining = "", [], iter(arguments)
    for argument in remaining:
        flag, equals, value = argument.partition("=")
        if flag in ("-config", "--config"):
            name = value if equals else next(remaining, "")
        else:
            others.append(argument)
    return name, others


def _one_line(error: Exception) -> str:
    """An exception's message on one line, without the escapes and quotes of a ``KeyError``."""
    message = str(error.args[0]) if error.args else type(error).__name__
    message = " ".join(message.replace("\\n", " ").replace("\\'", "'").split())
    quoted = re.fullmatch(r"(['\"])(.*)\1", message)
    return (quoted[2] if quoted else message).rstrip(".?")
