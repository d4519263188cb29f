"""The entry of the commands: turns mistakes and Ctrl-C into sentences."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.interruption import INTERRUPTED


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 2 for a mistake, 130 after Ctrl-C."""
    # JAX factorizes on a CPU with SciPy's OpenBLAS, whose threads spin against those of XLA: an
    # eigendecomposition takes up to forty times as long as with one. OpenBLAS reads the variable
    # when it is first needed, which is later than here.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        # Imported here: it takes seconds, in which Ctrl-C may come. The training job's own dependencies are an
        # extra, which the library does without.
        from kfe_optax.experiments.command_line import run_command

        return run_command(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        _say("interrupted.")
        return INTERRUPTED
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("kfe_optax"):
            raise
        return _say(
            f"the commands need '{error.name}'; install the package with its extra, as in "
            "pip install '.[experiments]' in a clone."
        )
    except ExperimentError as error:
        return _say(str(error))
    except (TypeError, ValueError) as error:
        from kfe_optax.experiments.optimizers import of_library

        if not of_library(error):
            raise
        return _say(str(error))
    except OSError as error:
        return _say(f"a file or a stream cannot be used ({error}); what was written before it stands.")


def _say(sentence: str) -> int:
    """Prints a sentence, where anybody still listens, and returns the exit status of a mistake."""
    with contextlib.suppress(OSError):
        print(f"kfe-optax: {sentence}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    from kfe_optax_command import main as command

    sys.exit(command())
