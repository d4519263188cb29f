"""Pytest in a forked process that has JAX loaded already, on one copy of the project."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import coverage
import pytest

from .faults import ROOT

LIBRARY = "kfe_optax"


def copy_project(into: pathlib.Path) -> pathlib.Path:
    """The files under version control, and those that could be."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True).stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, into / name)
    return into


class Job(NamedTuple):
    """One process: where it runs, what it does, where its result and its output go, how long it may take."""

    key: Any
    folder: pathlib.Path
    work: Callable[[pathlib.Path], None]
    seconds: float


def run(jobs: Iterable[Job], processes: int) -> Iterator[tuple[Job, bool]]:
    """Runs the jobs, some at a time; yields each as it ends, and whether it ended in time."""
    waiting, running = iter(jobs), {}
    while True:
        while len(running) < processes and (job := next(waiting, None)) is not None:
            running[_fork(job)] = (job, time.monotonic() + job.seconds)
        if not running:
            return
        for pid, (job, end) in list(running.items()):
            late = time.monotonic() > end
            if late:
                os.killpg(pid, signal.SIGKILL)
            if os.waitpid(pid, 0 if late else os.WNOHANG)[0]:
                del running[pid]
                yield job, not late
        time.sleep(0.1)


def _fork(job: Job) -> int:
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        log = os.open(job.folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        project = job.folder / "project"
        os.chdir(project)
        # The copy's library and tests, here and in the processes that tests start.
        sys.path[:] = [str(project), *(path for path in sys.path if path not in ("", str(ROOT)))]
        os.environ["PYTHONPATH"] = str(project)
        for name in [n for n in sys.modules if n.partition(".")[0] in (LIBRARY, "tests")]:
            del sys.modules[name]
        job.work(job.folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_pytest(arguments: Sequence[str], *plugins: Any) -> None:
    """In a job: pytest on the copy. What it finds is the plugins' affair."""
    code = pytest.main(["-q", "-p", "no:cacheprovider", "--tb=line", *arguments], plugins=plugins)
    if code in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERNAL_ERROR):
        raise RuntimeError(f"pytest ended with {code!r}")
    library = sys.modules.get(LIBRARY)
    if library and not pathlib.Path(library.__file__).is_relative_to(pathlib.Path.cwd()):
        raise RuntimeError(f"{library.__file__} is not the copy's library")


class Durations:
    """Seconds of every test, its fixtures included, and which tests failed."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed and report.nodeid not in self.failed:
            self.failed.append(report.nodeid)


class Collected:
    """The tests that a run would run."""

    def __init__(self):
        self.tests: list[str] = []

    def pytest_collection_finish(self, session):
        self.tests = [item.nodeid for item in session.items]


class Contexts:
    """Coverage of the library, by test."""

    def __init__(self, project: pathlib.Path):
        self.project = project
        self.measured = coverage.Coverage(data_file=None, source=[str(project / LIBRARY)], config_file=False)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.measured.switch_context(item.nodeid)
        return (yield)

    def lines(self) -> dict[str, dict[int, list[str]]]:
        """{file: {line: tests}}; what runs on import belongs to no test."""
        data = self.measured.get_data()
        return {
            str(pathlib.Path(file).relative_to(self.project)): {
                line: tests
                for line, contexts in data.contexts_by_lineno(file).items()
                if (tests := sorted(context for context in contexts if context))
            }
            for file in data.measured_files()
        }


class Chosen:
    """These tests alone of those that are collected: not every name can be said on a command line."""

    def __init__(self, tests: Iterable[str]):
        self.tests = set(tests)
        self.files = sorted({test.partition("::")[0] for test in self.tests})

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if item.nodeid in self.tests]


class Stop:
    """Once a test of a file has failed, the rest of that file is left out."""

    def __init__(self, progress: pathlib.Path):
        self.progress, self.seen = progress, {}
        self.save()

    def save(self, now: str | None = None) -> None:
        self.progress.write_text(json.dumps({"seen": self.seen, "now": now}))

    def pytest_runtest_setup(self, item):
        if (file := item.nodeid.partition("::")[0]) in self.seen:
            pytest.skip(f"a test of {file} has failed")
        self.save(item.nodeid)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.seen.setdefault(report.nodeid.partition("::")[0], report.nodeid)
            self.save()

    def pytest_collectreport(self, report):
        if report.failed:
            self.seen.setdefault(report.nodeid.partition("::")[0], f"{report.nodeid} (collection)")
            self.save()
