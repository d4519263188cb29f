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

# Times are parts of what all tests together took when they were mapped, so that neither a slow machine nor a busy one chooses
# other tests. A test file that sees a fault mostly does so in its first tests: the quickest, as many as fit in this.
PART_A_FILE = 1 / 200
# What executes a line of the core takes the whole suite: the narrowest files tell.
FILES = 5
# A fault that none of those sees is shown to more, for so long.
PART_UNSEEN = 1 / 10
# After this a run hangs (a fault may make a loop endless), which is not overlooked either.
PART_HANGING = 1 / 2


def choose(fault: Fault, maps: dict[str, FileMap]) -> tuple[list[str], list[str]]:
    """The tests to begin with, and those for a fault that they do not see.

    What tests of a file share, a compiled step for instance, executes its lines in the first test that asks for it; what is wrong
    another one may see. So among the later ones are all tests of the files in which one executes the line.
    """
    lines = fault.lines((ROOT / fault.file).read_text())
    whole = _whole(maps)
    reached = {file: found for file, found in maps.items() if found.executing(fault, lines)}
    first: list[str] = []
    for found in list(reached.values())[:FILES]:
        executing = found.executing(fault, lines)
        first += _within(found, executing, PART_A_FILE * whole) or executing[:1]
    # Of a line that everything executes, the quickest tests wherever they stand; then all tests of the narrowest files.
    everywhere = sorted(
        (found.cost(test), test)
        for found in reached.values()
        for test in found.executing(fault, lines)
        if test not in first
    )
    later, spent = [], 0.0
    for cost, test in everywhere:
        if spent + cost > PART_UNSEEN * whole / 2:
            break
        later.append(test)
        spent += cost
    for found in reached.values():
        executing = [test for test in found.executing(fault, lines) if test not in {*first, *later}]
        others = sorted(found.tests - {*first, *later, *executing}, key=found.cost)
        chosen = _within(
            found, [*executing, *others], min(3 * PART_A_FILE * whole, PART_UNSEEN * whole - spent)
        )
        later += chosen
        spent += sum(map(found.cost, chosen))
    return first, later


def _whole(maps: dict[str, FileMap]) -> float:
    """Seconds of all tests."""
    return sum(found.cost(test) for found in maps.values() for test in found.tests)


def _within(found: FileMap, tests: list[str], seconds: float) -> list[str]:
    """As many of the first of them as take no longer."""
    chosen: list[str] = []
    for test in tests:
        seconds -= found.cost(test)
        if seconds < 0:
            break
        chosen.append(test)
    return chosen


def run(
    faults: list[Fault], maps: dict[str, FileMap], results: pathlib.Path, processes: int
) -> Iterator[str]:
    """Plants the faults that have no result yet; yields a line on each."""
    results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        base = forked.copy_project(folder / "base")
        wanted = [fault for fault in faults if not (results / f"{fault.identity}.json").exists()]
        limit = PART_HANGING * _whole(maps)
        jobs = (_job(fault, base, folder / fault.identity, choose(fault, maps), limit) for fault in wanted)
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
    fault: Fault, base: pathlib.Path, folder: pathlib.Path, chosen: tuple[list[str], list[str]], limit: float
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
                chosen_tests = forked.Chosen(tests)
                forked.run_pytest([*options, *chosen_tests.files], stop, chosen_tests)
        (folder / "ended").touch()

    (folder / "progress.json").write_text('{"seen": {}, "now": null}')
    return forked.Job((fault, chosen, time.monotonic()), folder, work, limit)
