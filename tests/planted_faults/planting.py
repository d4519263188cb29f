"""Runs the tests that execute a fault's lines on a copy with that fault in it."""

from __future__ import annotations

import json
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator

from . import forked
from .coverage_map import FileMap
from .faults import ROOT, Fault

# A test file that sees a fault mostly does so in its first tests: the quickest, as many as fit in this.
SECONDS_A_FILE = 8.0
# What executes a line of the core takes the whole suite: the narrowest files tell.
FILES = 5
# A fault that none of those sees is shown to all the tests that execute it, for so long.
SECONDS_UNSEEN = 60.0
# After this a run hangs (a fault may make a loop endless), which is not overlooked either.
SECONDS = 600.0


def choose(fault: Fault, maps: dict[str, FileMap]) -> tuple[list[str], list[str]]:
    """The tests to begin with, and those for a fault that they do not see."""
    lines = fault.lines((ROOT / fault.file).read_text())
    first: list[str] = []
    later: list[str] = []
    spent, files = 0.0, 0
    for found in maps.values():
        executing = found.executing(fault, lines)
        files += bool(executing)
        here = 0.0
        for index, test in enumerate(executing):
            seconds = found.seconds.get(test, 0.0)
            if files <= FILES and (not index or here + seconds <= SECONDS_A_FILE):
                first.append(test)
                here += seconds
            elif spent + seconds <= SECONDS_UNSEEN:
                later.append(test)
                spent += seconds
    return first, later


def run(
    faults: list[Fault], maps: dict[str, FileMap], results: pathlib.Path, processes: int
) -> Iterator[str]:
    """Plants the faults that have no result yet; yields a line on each."""
    results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        base = forked.copy_project(folder / "base")
        wanted = [fault for fault in faults if not (results / f"{fault.identity}.json").exists()]
        jobs = (_job(fault, base, folder / fault.identity, choose(fault, maps)) for fault in wanted)
        for done, (job, in_time) in enumerate(forked.run(jobs, processes), 1):
            fault, chosen, start = job.key
            progress = json.loads((job.folder / "progress.json").read_text())
            seen = dict(progress["seen"])
            if not in_time and progress["now"]:
                seen.setdefault(progress["now"].partition("::")[0], f"{progress['now']} (does not end)")
            seconds = time.monotonic() - start
            record = {
                "name": fault.name,
                "area": fault.area,
                "seen": seen,
                "files": sorted({test.partition("::")[0] for test in chosen[0]}),
                "tests": len(chosen[0]),
                "all": bool(not seen),
                "seconds": round(seconds, 1),
            }
            ended = (job.folder / "ended").exists() or not in_time
            if ended:
                (results / f"{fault.identity}.json").write_text(json.dumps(record, indent=1))
                verdict = f"seen by {len(seen)} of {len(record['files'])} files" if seen else "NOT SEEN"
            else:
                verdict = "NO RESULT: " + (job.folder / "output.txt").read_text()[-1500:]
            yield f"[{done}/{len(wanted)}] {fault.name}: {verdict}, {seconds:.0f} s"
            shutil.rmtree(job.folder)


def _job(
    fault: Fault, base: pathlib.Path, folder: pathlib.Path, chosen: tuple[list[str], list[str]]
) -> forked.Job:
    project = folder / "project"
    shutil.copytree(base, project)
    text = (project / fault.file).read_text()
    (project / fault.file).write_text(fault.planted(text))

    def work(folder: pathlib.Path) -> None:
        stop = forked.Stop(folder / "progress.json")
        options = ["--continue-on-collection-errors", "-m", ""]
        for tests in chosen:
            if tests and not stop.seen:
                forked.run_pytest([*options, *tests], stop)
        (folder / "ended").touch()

    (folder / "progress.json").write_text('{"seen": {}, "now": null}')
    return forked.Job((fault, chosen, time.monotonic()), folder, work, SECONDS)
