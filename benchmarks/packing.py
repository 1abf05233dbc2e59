"""What rank packing costs: ranks 8, 16, 32 of the tiny base in one process, against each in a process of its own."""

import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.surroundings import ROOT

RANKS = ("r8", "r16", "r32")
STEPS = 300


@dataclass(frozen=True)
class Cost:
    """Of one process from its start to its end.

    Attributes:
        seconds, cpu_seconds: wall clock, and time on the cores.
        peak_mb: peak resident memory.
    """

    seconds: float
    cpu_seconds: float
    peak_mb: float


def packed(outputs: Path, dataset: Path, steps: int = STEPS) -> Cost:
    """All ranks in one process."""
    return _run(outputs, dataset, steps, RANKS)


def in_turn(outputs: Path, dataset: Path, steps: int = STEPS) -> list[Cost]:
    """Each rank in a process of its own; the feature cache of the first serves the others, as it does in a sweep."""
    return [_run(outputs, dataset, steps, (rank,)) for rank in RANKS]


def _run(outputs: Path, dataset: Path, steps: int, ranks: tuple[str, ...]) -> Cost:
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.packing", str(outputs), str(dataset), str(steps), *ranks]
    told = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(seconds, cpu, json.loads(told.splitlines()[-1]))


def main(outputs: str, dataset: str, steps: str, *ranks: str) -> None:
    """Train `ranks` in this process and print its peak memory in MB."""
    from vlaexp.config import compose
    from vlaexp.workflow.packed import train_packed
    from vlaexp.workflow.train import train

    keys = ["trainer=cpu", "tracker=csv", "augmentation=none", "cache.mode=features", f"trainer.max_steps={steps}"]
    keys += ["dataset=tabletop_pick", f"dataset.root={dataset}", f"outputs={outputs}"]
    cfgs = [compose("train", [*keys, f"lora={rank}"]) for rank in ranks]
    for outcome in train_packed(cfgs) if len(cfgs) > 1 else [train(cfgs[0])]:
        if isinstance(outcome, BaseException):
            raise outcome
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)  # KiB on Linux


if __name__ == "__main__":
    main(*sys.argv[1:])
