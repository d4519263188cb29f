"""What ``diagnose`` measures: ``config.diagnose``, read and checked, and its help."""

from __future__ import annotations

from typing import NamedTuple

from ml_collections import ConfigDict

import kfe_optax as kfe
from kfe_optax.experiments.errors import ExperimentError

DIAGNOSE_HELP = """\
diagnose
  Trains with Adam and measures, every few steps, how far each Kronecker factorization is from the
  exact Fisher block F of one layer (on the step's own batch, targets sampled from the model).
  Writes diagnose.csv (step, method, quantity, value), diagnose.png and correlation.png to --workdir
  and prints the means over training and which of the theory's inequalities hold at every step.

  --config.diagnose.layer=5          the layer: its number, from 1, or its name; empty: the fifth, or
                                     in a smaller network the one after the middle
  --config.diagnose.optimizer=adam   what trains the network; it follows the config's own schedule
  --config.diagnose.steps=150        training steps
  --config.diagnose.every=5          steps between two measurements
  --config.diagnose.examples=0       images of the batch that make up F; 0: all
  --config.diagnose.tolerance=1e-5, --config.diagnose.max_iterations=500
                                     where the iterations of KPSVD, deflation, Lanczos and
                                     KFAC-corrected end
  --config.diagnose.spectrum_limit=1500
                                     the spectrum of a sum of two terms needs a dense matrix of F's
                                     size; a larger layer leaves these fields empty
  --config.diagnose.basis_update_period=50
                                     steps between refreshes in the comparison of amortized K-FAC
                                     with EKFAC in the same old basis; a multiple of 'every'
  --config.diagnose.decay=0.95       of the running averages, one update a measurement
  --config.diagnose.running_examples=128
                                     at most so many images of a batch make up the running averages;
                                     0: all
  --config.diagnose.window=60        batches from which the running F is known; older ones are
                                     left out
  --config.diagnose.coordinates=36   coordinates of the gradient in correlation.png

quantities in diagnose.csv
  error, spectrum_error              of an estimate from this batch: |F - F'| / |F| in the Frobenius
                                     norm, and the same of the sorted eigenvalues
  stale_error, stale_spectrum_error  of what an amortized optimizer has: factors and basis of the
                                     last refresh; ekfac rescales with this batch, ekfac_running
                                     with a running average
  running_error                      of averaged factors, and of streaming ones, against the
                                     running average of F; best_rank_1 and _2 bound them from below
  correlation                        mean |correlation| between coordinates of the gradient
  iterations, loss                   products with F that an estimate took; the training loss

example
  kfe-optax diagnose --config=configs/mnist_autoencoder.py --config.data_dir=data/mnist \\
      --config.diagnose.steps=100 --workdir=runs/diagnose
"""


class Plan(NamedTuple):
    """``config.diagnose``; ``examples``, ``running_examples`` and ``window`` as they will be used."""

    layer: str
    optimizer: str
    steps: int
    every: int
    basis_update_period: int
    examples: int
    decay: float
    running_examples: int
    window: int
    spectrum_limit: int
    coordinates: int
    tolerance: float
    max_iterations: int

    @property
    def measurements(self) -> int:
        """How often a whole run is measured."""
        return self.steps // self.every + 1


def make_plan(config: ConfigDict) -> Plan:
    """Reads ``config.diagnose``; the layer is still as the user names it.

    Raises:
      ExperimentError: a setting that cannot be.
    """
    if "diagnose" not in config:
        raise ExperimentError(
            "The config has no 'diagnose'; let its file start from settings.base_config(...)."
        )
    plan = Plan(**config.diagnose.to_dict())
    for field in ("steps", "every", "basis_update_period", "window", "max_iterations"):
        if getattr(plan, field) < 1:
            raise ExperimentError(f"config.diagnose.{field} is {getattr(plan, field)}; set it to at least 1.")
    if plan.basis_update_period % plan.every:
        raise ExperimentError(
            f"config.diagnose.basis_update_period is {plan.basis_update_period} and 'every' is {plan.every}; a refresh "
            "happens at a measurement, so make the period a multiple of 'every'."
        )
    if plan.coordinates < 2:
        raise ExperimentError(
            f"config.diagnose.coordinates is {plan.coordinates}; correlations need at least 2."
        )
    for field, low, high in (("decay", 0.0, 1.0), ("tolerance", 0.0, 1.0)):
        if not low <= getattr(plan, field) < high:
            raise ExperimentError(
                f"config.diagnose.{field} is {getattr(plan, field)}; give a number from {low:g} up to, and not "
                f"including, {high:g}."
            )
    batch_size = config.batch_size
    if not 0 <= plan.examples <= batch_size:
        raise ExperimentError(
            f"config.diagnose.examples is {plan.examples} and config.batch_size {batch_size}; choose from 1 to the batch "
            "size, or 0 for all."
        )
    if plan.running_examples < 0:
        raise ExperimentError(
            f"config.diagnose.running_examples is {plan.running_examples}; set it to at least 1, or 0 for all."
        )
    examples = plan.examples or batch_size
    return plan._replace(
        examples=examples,
        running_examples=min(plan.running_examples or examples, examples),
        window=min(plan.window, plan.measurements),
    )


def find_layer(layers: kfe.Layers, wanted: str) -> str:
    """The name of the layer that ``config.diagnose.layer`` means.

    Example::

        find_layer(layers, "2")                         # the second layer of the forward pass
    """
    names = list(layers)
    if not wanted:
        return names[min(5, len(names) // 2 + 1, len(names)) - 1]
    if wanted in names:
        return wanted
    if wanted.isdecimal() and 1 <= int(wanted) <= len(names):
        return names[int(wanted) - 1]
    raise ExperimentError(
        f"config.diagnose.layer is '{wanted}'; give a number from 1 to {len(names)}, or one of {', '.join(names)}."
    )
