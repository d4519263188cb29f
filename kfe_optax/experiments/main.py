"""The entry of the console script ``kfe-optax``: turns mistakes and Ctrl-C into sentences."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from kfe_optax.experiments.errors import ExperimentError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 2 for a mistake, 130 after Ctrl-C.

    Example::

        main(["train", "--config=configs/mnist_small.py", "--config.steps=100"])
    """
    # JAX factorizes on a CPU with SciPy's OpenBLAS, whose threads spin against those of XLA: an
    # eigendecomposition takes up to forty times as long as with one. OpenBLAS reads the variable
    # when it is first needed, which is later than here.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        # The training job's own dependencies are an extra, which the library does without.
        from kfe_optax.experiments.command_line import INTERRUPTED, run_command
    except ModuleNotFoundError as error:
        print(
            f"kfe-optax: the commands need '{error.name}'; install the package with its extra, as in "
            "pip install '.[experiments]' in a clone.",
            file=sys.stderr,
        )
        return 2
    try:
        return run_command(list(sys.argv[1:] if argv is None else argv))
    except ExperimentError as error:
        print(f"kfe-optax: {error}", file=sys.stderr)
        return 2
    except (TypeError, ValueError) as error:
        from kfe_optax.experiments.optimizers import of_library

        if not of_library(error):
            raise
        print(f"kfe-optax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kfe-optax: interrupted.", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
