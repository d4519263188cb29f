"""The command line: its flags, its help, and which function each command calls."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags
from rich.console import Console

from kfe_optax.experiments.config_files import load_config
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.interruption import INTERRUPTED
from kfe_optax.experiments.optimizers import METHODS
from kfe_optax.experiments.options import descriptions
from kfe_optax.experiments.schedules import schedule

_HELP = """\
usage: kfe-optax COMMAND --config=FILE [--workdir=FOLDER] [--config.FIELD=VALUE ...]

Trains networks with K-FAC, EKFAC and their relatives on real images and texts.

commands
  train      train one optimizer: records, checkpoints, a final evaluation
  compare    train several optimizers from the same start; a figure and a table
  layers     print the layers that the library finds in the model
  sweep      search learning rate, damping and clipping: a picture and the best setting as a config
             ('kfe-optax sweep --help' explains it)
  diagnose   train and measure how far every factorization is from a layer's exact Fisher block
             ('kfe-optax diagnose --help' explains it)

flags
  --config=FILE           a Python file with get_config(), as in configs/; a bare name stands for
                          configs/NAME.py
  --config.FIELD=VALUE    override a field of the config, as often as you like; nested fields are
                          written with dots
  --workdir=FOLDER        where results go (default: runs/NAME-OPTIMIZER for train, runs/NAME for
                          compare, runs/NAME-OPTIMIZER-sweep for sweep, runs/NAME-diagnose)
  --resume                (train) continue from the newest checkpoint in --workdir
                          (sweep) skip the trials that are recorded in --workdir
  --help                  this text; with --config also that config's fields and values, and what each
                          option of its optimizers is

  A number of an optimizer becomes a schedule when a part of one is set:
      --config.kfac.momentum.kind=linear --config.kfac.momentum.end=0.5

examples
  kfe-optax compare --config=configs/mnist_small.py
  kfe-optax train --config=configs/mnist_autoencoder.py --config.data_dir=data/mnist
  kfe-optax train --config=configs/mnist_small.py --config.optimizer=kfac --config.steps=200 \\
      --config.kfac.learning_rate.value=0.05 --workdir=runs/first
  kfe-optax train --config=configs/mnist_small.py --config.optimizer=kfac --config.steps=400 \\
      --config.kfac.learning_rate.value=0.05 --workdir=runs/first --resume
  kfe-optax compare --config=configs/mnist_small.py --config.compare.optimizers=adam,ekfac \\
      --config.compare.seconds=30
  kfe-optax layers --config=configs/mnist_classifier.py
  kfe-optax train --config=configs/resnet20.py --config.data_dir=data/cifar-10 \\
      --config.model.batch_norm=False --config.steps=78000
  kfe-optax train --config=configs/mnist_small.py --config.devices.mode=sharded
"""
_COMMANDS = ("train", "compare", "layers", "sweep", "diagnose")
_RESUMABLE = ("train", "sweep")
_HELP_FLAGS = ("-h", "-help", "--help")


def run_command(arguments: list[str]) -> int:
    """Runs the command that ``arguments`` describe and returns its exit status."""
    console = Console()
    # Orbax reports every file that it writes, and every error with its stack, which here becomes a sentence.
    absl_logging.set_verbosity(absl_logging.FATAL)
    wants_help = any(argument in _HELP_FLAGS for argument in arguments)
    others = [argument for argument in arguments if argument not in _HELP_FLAGS]
    if wants_help or not others:
        print(_HELP, end="")
        name, words = _without_config_file(others)
        if "sweep" in words:
            from kfe_optax.experiments.sweep_space import SWEEP_HELP

            print(f"\n{SWEEP_HELP}", end="")
        if "diagnose" in words:
            from kfe_optax.experiments.diagnose_plan import DIAGNOSE_HELP

            print(f"\n{DIAGNOSE_HELP}", end="")
        if name:
            config = load_config(name)
            print(f"\nthe fields of this config\n{config}")
            for optimizer in sorted(METHODS.keys() & set(config)):
                known = descriptions(METHODS[optimizer].make)
                print(f"\n--config.{optimizer}.…")
                for field in config[optimizer]:
                    print(f"  {field:24}{known.get(field, '')}")
        return 0 if wants_help else 2
    request = _parse(others)
    config, workdir = request.config, request.workdir
    # Imported late, so that --help and a mistyped flag do not wait for Orbax and Matplotlib.
    if request.command == "train":
        return _train(config, workdir, request.resume, console)
    if request.command == "compare":
        from kfe_optax.experiments.compare import compare

        compare(config, workdir or Path("runs") / config.name, console)
        return 0
    if request.command == "sweep":
        return _sweep(config, workdir, request.resume, console)
    if request.command == "diagnose":
        return _diagnose(config, workdir, console)
    from kfe_optax.experiments.data import load
    from kfe_optax.experiments.job import make_layers

    print(make_layers(config, load(config)))
    return 0


def _train(config: ConfigDict, workdir: str, resume: bool, console: Console) -> int:
    from kfe_optax.experiments.processes import join_processes, writes
    from kfe_optax.experiments.report import measures_table
    from kfe_optax.experiments.train import train

    join_processes(config)
    console = console if writes() else Console(quiet=True)
    folder = Path(workdir or Path("runs") / f"{config.name}-{config.optimizer}")
    outcome = train(config, folder, resume=resume, console=console)
    if outcome.interrupted:
        console.print(
            f"Interrupted after step {outcome.step}; the same command with --resume continues "
            f"from the checkpoint in '{folder}'."
            if outcome.step
            else "Interrupted before the first checkpoint; the same command starts again.",
            highlight=False,
            soft_wrap=True,
        )
        return INTERRUPTED
    title = f"{config.title}: {config.optimizer}, {outcome.step} steps, {outcome.seconds:.1f} s"
    console.print(measures_table(outcome.measures, title=title))
    console.print(f"results    {folder}", highlight=False, soft_wrap=True)
    return 0


def _sweep(config: ConfigDict, workdir: str, resume: bool, console: Console) -> int:
    from kfe_optax.experiments.sweep import sweep

    folder = Path(workdir or Path("runs") / f"{config.name}-{config.optimizer}-sweep")
    outcome = sweep(config, folder, resume=resume, console=console)
    if outcome.interrupted:
        console.print(
            f"Interrupted after {outcome.recorded} trials; the same command with --resume continues "
            f"from '{folder / 'sweep.csv'}'.",
            highlight=False,
            soft_wrap=True,
        )
        return INTERRUPTED
    return 0


def _diagnose(config: ConfigDict, workdir: str, console: Console) -> int:
    from kfe_optax.experiments.diagnose import diagnose

    folder = Path(workdir or Path("runs") / f"{config.name}-diagnose")
    found = diagnose(config, folder, console=console)
    if not found.interrupted:
        return 0
    console.print(
        f"Interrupted after step {found.series.steps[-1]}, the last one measured; '{folder}' holds what was measured up to it.",
        highlight=False,
        soft_wrap=True,
    )
    return INTERRUPTED


class _Request(NamedTuple):
    """What the arguments ask for; ``config`` has its overrides."""

    command: str
    config: ConfigDict
    workdir: str
    resume: bool


def _parse(arguments: list[str]) -> _Request:
    """Reads the arguments of a command."""
    name, arguments = _without_config_file(arguments)
    config = load_config(name) if name else None
    # Flags of our own, not absl's global ones, so that a program can run any number of commands.
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", "", "", flag_values=values)
    flags.DEFINE_bool("resume", False, "", flag_values=values)
    program = ["kfe-optax", *arguments]
    if config is not None:
        _make_schedules(config, arguments)
    try:
        if config is not None:
            # The definition already reads the overrides, to learn their types.
            config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=program)
        words = values(program)[1:]
    except (AttributeError, KeyError) as error:
        raise ExperimentError(
            f"A --config.FIELD flag names a field that the config does not have: {_one_line(error)}; "
            "'kfe-optax --help --config=...' prints the fields."
        ) from error
    except (flags.Error, TypeError, ValueError) as error:
        raise ExperimentError(f"{_one_line(error)}.") from error
    if len(words) != 1 or words[0] not in _COMMANDS:
        given = " ".join(words) or "none"
        raise ExperimentError(
            f"Name one command of {', '.join(_COMMANDS)} (given: {given}); 'kfe-optax --help' shows examples."
        )
    if config is None:
        raise ExperimentError(f"Name a config, as in 'kfe-optax {words[0]} --config=configs/mnist_small.py'.")
    if values.resume and words[0] not in _RESUMABLE:
        raise ExperimentError(f"--resume belongs to 'train' and 'sweep', not to '{words[0]}'.")
    return _Request(words[0], config, values.workdir, values.resume)


def _make_schedules(config: ConfigDict, arguments: list[str]) -> None:
    """A number of which a flag names a part (--config.kfac.momentum.kind=linear) becomes a schedule that starts from it."""
    parts = "|".join(schedule(0.0))
    for argument in arguments:
        named = re.match(rf"--?config\.(\w+)\.(\w+)\.({parts})=", argument)
        own = config.get(named.group(1)) if named else None
        if (
            named
            and isinstance(own, ConfigDict)
            and isinstance(own.get(field := named.group(2), ""), float | int | None)
        ):
            with own.ignore_type():
                own[field] = schedule(own[field] or 0.0)


def _without_config_file(arguments: list[str]) -> tuple[str, list[str]]:
    """The value of ``--config`` and the other arguments.

    The flag is taken out by hand because it decides which ``--config.FIELD`` flags there are.
    """
    name, others = "", []
    remaining = iter(arguments)
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
    while len(message) > 1 and message[0] == message[-1] and message[0] in "'\"":
        message = message[1:-1]
    return message.rstrip(".?")
