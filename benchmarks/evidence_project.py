"""Criteria of the project as a thing to work with: a quick command line, quick tests."""

import statistics
import subprocess
import time
from collections.abc import Iterator

from benchmarks.criteria import Found, measures
from benchmarks.surroundings import ROOT


@measures()
def command_line() -> Iterator[Found]:
    program = ROOT / ".venv" / "bin" / "vlaexp"
    for name, arguments in (
        ("vlaexp --help", ["--help"]),
        ("vlaexp train --help", ["train", "--help"]),
        ("a mistyped verb", ["trian"]),
    ):
        times = []
        for _ in range(5):
            began = time.perf_counter()
            subprocess.run([program, *arguments], capture_output=True, check=False)
            times.append(time.perf_counter() - began)
        yield Found(f"{name}, median seconds", statistics.median(times), "<= 0.5", len(times))


@measures(long=True)
def test_duration() -> Iterator[Found]:
    began = time.monotonic()
    done = subprocess.run(["make", "test"], cwd=ROOT, check=False)
    yield Found("make test in seconds", time.monotonic() - began, "<= 600", 1)
    yield Found("make test, exit status", done.returncode, "<= 0", 1)
