"""Several processes as one training job: joining them, who writes, and what they must agree on."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from kfe_optax.experiments.errors import ExperimentError


def join_processes(config: ConfigDict) -> None:
    """Joins the processes of ``config.distributed`` with ``jax.distributed.initialize``, before any device is touched.

    ``config.cluster`` holds the coordinator's address ``host:port``, this process's number and how many there are. What is
    left out comes from the cluster's environment (Slurm, Open MPI, Kubernetes, TPU pods).

    Example::

        config.distributed = True
        config.cluster.update(coordinator="10.0.0.1:1234", process_id=0, num_processes=2)
        join_processes(config)
    """
    if not config.get("distributed", False):
        return
    if config.devices.mode not in ("sharded", "shard_map"):
        raise ExperimentError(
            f"config.distributed is set and config.devices.mode is '{config.devices.mode}'; set the mode to 'sharded' or "
            "'shard_map', which several processes can share."
        )
    cluster = config.cluster
    if cluster.coordinator and not 0 <= cluster.process_id < cluster.num_processes:
        raise ExperimentError(
            f"config.cluster.process_id is {cluster.process_id} of config.cluster.num_processes {cluster.num_processes}; the "
            "processes are numbered from 0."
        )
    if jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(
            coordinator_address=cluster.coordinator or None,
            num_processes=cluster.num_processes or None,
            process_id=cluster.process_id if cluster.process_id >= 0 else None,
        )
    except ValueError as error:
        raise ExperimentError(
            f"config.distributed is set and the cluster's environment does not say all ({str(error).rstrip('.')}); set "
            "config.cluster.coordinator, config.cluster.process_id and config.cluster.num_processes."
        ) from error


def writes() -> bool:
    """Whether this process is the one that talks and writes."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; all of them call this at the same time."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def wait_for_all() -> None:
    """Waits until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("wait_for_all")
