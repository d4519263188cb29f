"""Which tests execute which line of the library, and how long each takes: one process for each test file."""

from __future__ import annotations

import json
import pathlib
import shutil
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

from . import forked
from .faults import ROOT, Fault


class FileMap(NamedTuple):
    """One test file: seconds of each test, {library file: {line: tests}}, the tests that count."""

    seconds: dict[str, float]
    lines: dict[str, dict[int, list[str]]]
    tests: set[str]

    def cost(self, test: str) -> float:
        """How long it took, its fixtures included."""
        return self.seconds.get(test, 0.0)

    def executing(self, fault: Fault, lines: set[int]) -> list[str]:
        """The tests that execute one of the lines, the quickest first."""
        here = self.lines.get(fault.file, {})
        return sorted({test for line in lines for test in here.get(line, ())}, key=self.cost)

    @property
    def breadth(self) -> int:
        """How many lines of the library the whole file executes."""
        return sum(bool(tests) for lines in self.lines.values() for tests in lines.values())


def measure(into: pathlib.Path, patterns: Sequence[str], marker: str, processes: int) -> None:
    """Adds what is not in the folder yet, a file of JSON for each test file."""
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        wanted = [
            name
            for path in sorted((ROOT / "tests").rglob("test_*.py"))
            if "planted_faults" not in (name := str(path.relative_to(ROOT)))
            and _counts(name, patterns)
            and not (into / _stored(name)).exists()
        ]
        jobs = (_job(name, pathlib.Path(folder), marker) for name in wanted)
        for done, (job, in_time) in enumerate(forked.run(jobs, processes), 1):
            result = job.folder / "map.json"
            if in_time and result.exists():
                shutil.copy(result, into / _stored(job.key))
                found = json.loads(result.read_text())
                print(
                    f"[{done}/{len(wanted)}] {job.key}: {len(found['seconds'])} tests, {sum(found['seconds'].values()):.0f} s",
                    flush=True,
                )
                for test in found["failed"]:
                    print(f"    FAILED without a fault: {test}", flush=True)
            else:
                print(f"[{done}/{len(wanted)}] {job.key}: no result", flush=True)
                print((job.folder / "output.txt").read_text()[-2000:], flush=True)
            shutil.rmtree(job.folder)


def _counts(name: str, patterns: Sequence[str]) -> bool:
    return any(pathlib.PurePath(name).match(pattern) for pattern in patterns)


def _stored(name: str) -> str:
    return name.replace("/", "--") + ".json"


def _job(name: str, folder: pathlib.Path, marker: str) -> forked.Job:
    mine = folder / _stored(name)
    forked.copy_project(mine / "project")

    def work(folder: pathlib.Path) -> None:
        contexts, durations = forked.Contexts(folder / "project"), forked.Durations()
        contexts.measured.start()
        forked.run_pytest([name, "-m", marker], contexts, durations)
        contexts.measured.stop()
        found = {"seconds": durations.seconds, "failed": durations.failed, "lines": contexts.lines()}
        (folder / "map.json").write_text(json.dumps(found))

    return forked.Job(name, mine, work, 1800)


def collect(marker: str) -> set[str]:
    """The tests that there are now."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        forked.copy_project(folder / "project")

        def work(folder: pathlib.Path) -> None:
            collected = forked.Collected()
            forked.run_pytest(["--collect-only", "-m", marker, "tests"], collected)
            (folder / "collected.json").write_text(json.dumps(collected.tests))

        list(forked.run([forked.Job(None, folder, work, 600)], 1))
        return set(json.loads((folder / "collected.json").read_text()))


def load(folder: pathlib.Path, patterns: Sequence[str], tests: set[str]) -> dict[str, FileMap]:
    """{test file: what was measured of these tests}, the narrowest first: the likeliest to say what a fault breaks."""
    maps = {}
    for path in sorted(folder.glob("*.json")):
        name = path.name.removesuffix(".json").replace("--", "/")
        if not _counts(name, patterns):
            continue
        found = json.loads(path.read_text())
        lines = {
            file: {int(number): [test for test in here if test in tests] for number, here in its.items()}
            for file, its in found["lines"].items()
        }
        own = tests & found["seconds"].keys()
        maps[name] = FileMap(found["seconds"], lines, own)
    return dict(sorted(maps.items(), key=lambda item: item[1].breadth))
