"""Training in several processes on this machine, each with some CPU devices, joined over the loopback interface.

    python benchmarks/processes.py --processes 2 --devices 2 --config configs/mnist_small.py --workdir runs/two

is `kfe-optax train` with those flags in two processes of two devices; further flags (`--config.steps=100`, `--resume`) are
handed on. What process 0 says is passed on; when a process dies, all are ended, and what the dead one said is shown.
`--kill-after STEPS` kills the last process after that many recorded steps, to see what a run loses by it: nothing up to its
last checkpoint.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DEVICE_FLAG = "--xla_force_host_platform_device_count"
# What the training job ends with when it is done, and after Ctrl-C: then the others end by themselves.
ENDINGS = (0, 130)


class Member(NamedTuple):
    """One of the processes, and the file of what it says; None for the first, which says it to the reader."""

    process: subprocess.Popen
    log: Path | None


def free_port() -> int:
    """A port of the loopback interface that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    """This process's environment with so many CPU devices."""
    others = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(DEVICE_FLAG)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join((*others, f"{DEVICE_FLAG}={devices}")),
        "PYTHONPATH": path,
    }


def start(options: argparse.Namespace, flags: list[str], folder: Path) -> list[Member]:
    """Starts the processes; the logs go to `folder`."""
    command = [
        *(sys.executable, "-m", "kfe_optax.experiments.main", "train"),
        f"--config={options.config}",
        f"--workdir={options.workdir}",
        "--config.devices.mode=sharded",
        *flags,
        "--config.distributed=True",
        f"--config.cluster.coordinator=127.0.0.1:{free_port()}",
        f"--config.cluster.num_processes={options.processes}",
    ]

    def member(number: int) -> Member:
        own = [*command, f"--config.cluster.process_id={number}"]
        surroundings = environment(options.devices)
        if number == 0:
            return Member(subprocess.Popen(own, env=surroundings), None)
        log = folder / f"{number}.log"
        with log.open("w") as file:
            return Member(subprocess.Popen(own, env=surroundings, stdout=file, stderr=file), log)

    return [member(number) for number in range(options.processes)]


def recorded_steps(workdir: str) -> int:
    """The last step in the run's records."""
    path = Path(workdir) / "metrics.csv"
    lines = path.read_text().splitlines() if path.exists() else []
    step = lines[-1].partition(",")[0] if lines else ""
    return int(step) if step.isdigit() else 0


def watch(members: list[Member], kill_after: int | None, workdir: str) -> int:
    """Waits for the processes and returns the exit status: at once when one dies."""
    while True:
        statuses = [member.process.poll() for member in members]
        for number, status in enumerate(statuses):
            if status is not None and status not in ENDINGS:
                print(f"process {number} died with status {status}; all are ended.", file=sys.stderr)
                log = members[number].log
                sys.stderr.write(log.read_text() if log else "")
                return 1
        if None not in statuses:
            return statuses[0] or 0
        if kill_after is not None and recorded_steps(workdir) >= kill_after:
            members[-1].process.kill()
        time.sleep(0.05)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=2, help="CPU devices of each process")
    parser.add_argument("--config", default="configs/mnist_small.py")
    parser.add_argument("--workdir", default="runs/processes")
    parser.add_argument("--kill-after", type=int, metavar="STEPS")
    options, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        members = start(options, flags, Path(folder))

        def hand_on(number: int, frame: object) -> None:
            del frame
            # A terminal's Ctrl-C reaches them without us.
            if number == signal.SIGTERM:
                for member in members:
                    member.process.send_signal(number)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, hand_on)
        try:
            return watch(members, options.kill_after, options.workdir)
        finally:
            for member in members:
                member.process.kill()
                member.process.wait()


if __name__ == "__main__":
    sys.exit(main())
