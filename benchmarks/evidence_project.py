"""Criteria of the project as a thing to work with: a quick command line, quick tests."""

import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator

from benchmarks.criteria import Found, measures
from benchmarks.packing import RANKS, in_turn, packed
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
def rank_packing() -> Iterator[Found]:
    """Memory of ranks packed into one process over that of the largest alone, and their time over that in turn."""
    outputs = ROOT / "outputs" / "evidence" / "packing"
    shutil.rmtree(outputs, ignore_errors=True)
    program = ROOT / ".venv" / "bin" / "vlaexp"
    subprocess.run([program, "record", "dataset=tabletop_pick", f"outputs={outputs}"], check=True, cwd=ROOT)
    dataset = outputs / "datasets" / "tabletop_pick"
    together, apart = packed(outputs / "together", dataset), in_turn(outputs / "apart", dataset)
    memory = together.peak_mb / max(cost.peak_mb for cost in apart)
    yield Found(f"peak memory of {len(RANKS)} packed ranks over that of one", memory, "<= 1.3", len(RANKS))
    time_ratio = together.seconds / sum(cost.seconds for cost in apart)
    yield Found(f"time of {len(RANKS)} packed ranks over that of each in turn", time_ratio, "<= 0.9999", len(RANKS))


@measures(long=True)
def test_duration() -> Iterator[Found]:
    began = time.monotonic()
    done = subprocess.run(["make", "test"], cwd=ROOT, check=False)
    yield Found("make test in seconds", time.monotonic() - began, "<= 600", 1)
    yield Found("make test, exit status", done.returncode, "<= 0", 1)
