"""Jobs of a sweep in processes of this machine, in the foreground or detached; a failing job does not stop the others.

python -m vlaexp.sweep.local FOLDER MODULE:FUNCTION PROCESSES KEY ...      what `start_detached` runs
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import psutil

from vlaexp.processes import exit_with_parent
from vlaexp.sweep.folder import SweepFolder, this_process

MEMORY_PER_PROCESS = 3e9  # bytes; libraries and a tiny model take about half of it
Work = Callable[[str, str], None]


def run_here(folder: Path, work: Work, keys: Sequence[str], processes: int) -> None:
    """Run jobs side by side and wait for them; what became of each is in its state.

    Args:
        folder: of the sweep.
        work: module-level function of the sweep's folder and a job's key.
        keys: of the jobs, in the order in which they begin.
        processes: how many side by side; below 1 as many as cores and memory allow. Each imports its libraries once.
    """
    sweep, began, left = SweepFolder(folder), time.monotonic(), list(keys)
    names = {job.key: job.name for job in sweep.jobs()}
    count = processes if processes > 0 else usual_processes()
    count = min(count, len(left))
    while left:
        context = get_context("spawn")
        with ProcessPoolExecutor(count, context, _prepare, (count, context.Value("i", 0))) as pool:
            futures: dict[Future[None], str] = {pool.submit(work, str(folder), key): key for key in left}
            for future in as_completed(futures):
                key = futures[future]
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    continue  # looked at below, once every process is gone
                left.remove(key)
                state = sweep.state(key)
                words = state.get("state", "failed") if error is None else f"failed: {type(error).__name__}: {error}"
                done = f"{len(keys) - len(left)} of {len(keys)} after {time.monotonic() - began:.0f} s"
                print(f"{names[key]} {words}; {done}", file=sys.stderr, flush=True)
        left = _without_the_dead(sweep, left, names)


def _without_the_dead(sweep: SweepFolder, keys: Sequence[str], names: dict[str, str]) -> list[str]:
    """After the pool broke: jobs to go on with. One whose process died has failed; the pool stopped its neighbours."""
    left = []
    for key in keys:
        if sweep.state(key).get("state") == "running":
            text = "its process died (killed, out of memory?)"
            sweep.update_state(key, state="failed", error=text)
            print(f"{names[key]} failed: {text}", file=sys.stderr, flush=True)
        else:
            left.append(key)
    return left


def usual_processes() -> int:
    """As many as cores and free memory allow, at least one; with GPUs, one each."""
    by_memory = int(psutil.virtual_memory().available / MEMORY_PER_PROCESS)
    return max(1, min(len(gpus()) or os.cpu_count() or 1, by_memory))


def gpus() -> list[str]:
    """GPUs that this process may use, without importing torch."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    return [path.name.removeprefix("nvidia") for path in sorted(Path("/dev").glob("nvidia[0-9]*"))]


def _prepare(count: int, places: "Synchronized[int]") -> None:
    """In a new process: an even share of the cores, one of the GPUs, and an end when the parent ends."""
    exit_with_parent()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    with places.get_lock():
        place = places.value
        places.value += 1
    if found := gpus():
        os.environ["CUDA_VISIBLE_DEVICES"] = found[place % len(found)]


def start_detached(folder: Path, work: Work, keys: Sequence[str], processes: int) -> dict[str, object]:
    """As `run_here`, in a process that outlives this one; returns what identifies it."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-m", "vlaexp.sweep.local"),
        *(str(folder), f"{work.__module__}:{work.__qualname__}", str(processes), *keys),
    ]
    with (folder / "local.log").open("a") as log:
        runner = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    return this_process() | {"pid": runner.pid, "pid_created": psutil.Process(runner.pid).create_time()}


def _main(folder: str, work: str, processes: str, *keys: str) -> None:
    module, _, function = work.partition(":")
    run_here(Path(folder), getattr(import_module(module), function), keys, int(processes))


if __name__ == "__main__":
    _main(*sys.argv[1:])
