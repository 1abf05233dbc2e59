"""A sweep on a real SLURM when things go wrong: no point lost, none repeated, the same numbers in the end.

The work is a recurrence that checkpoints as a training does, so that each fault takes seconds; real trainings under the
same faults are in tests/workflow/test_slurm_sweep.py.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import SlurmCluster, wait_for

from vlaexp import interruption
from vlaexp.errors import UserError
from vlaexp.sweep import slurm as scheduler
from vlaexp.sweep.folder import SweepFolder, write_json
from vlaexp.sweep.jobs import Job, Task
from vlaexp.sweep.node import run_job
from vlaexp.sweep.status import job_statuses, point_rows

pytestmark = pytest.mark.slurm
STEPS, STEP_S = 40, 0.1
LAUNCHER = {
    "_target_": "SlurmLauncher",
    "timeout_min": 30,
    "signal_delay_s": 60,
    "max_num_timeout": 2,
    "gpus_per_node": 1,
    "cpus_per_task": 1,
    "mem_gb": 1,
    "array_parallelism": 8,
    "partition": None,
}


def work(folder: str, key: str) -> None:
    run_job(folder, key, recurrence)


def recurrence(job: Job, plan: dict[str, Any], tell: Any) -> list[Path]:
    """Forty steps of x <- 1.1 x + step, a line each, a checkpoint every 5 and when asked to stop."""
    name = job.tasks[0].name
    if name == "bad":
        raise UserError("this point is wrong; mend it")
    folder = Path(plan["common"][0]) / name
    folder.mkdir(exist_ok=True)
    checkpoint, lines = folder / "checkpoint.json", folder / "metrics.jsonl"
    state = json.loads(checkpoint.read_text()) if checkpoint.exists() else {"step": 0, "x": float(len(name))}
    rows = lines.read_text().splitlines()[: state["step"]] if lines.exists() else []
    lines.write_text("".join(f"{row}\n" for row in rows))
    with (folder / "starts").open("a") as file:
        file.write(f"{state['step']}\n")
    with interruption.deferred():
        while state["step"] < STEPS:
            if (number := interruption.requested()) is not None:
                write_json(checkpoint, state)
                raise interruption.Interrupted(number)
            time.sleep(STEP_S)
            state = {"step": state["step"] + 1, "x": 1.1 * state["x"] + state["step"]}
            with lines.open("a") as file:
                file.write(json.dumps(state) + "\n")
            if state["step"] % 5 == 0:
                write_json(checkpoint, state)
    return [checkpoint]


def final(name: str) -> float:
    x = float(len(name))
    for step in range(STEPS):
        x = 1.1 * x + step
    return x


class Sweep:
    """A sweep of recurrences and what the tests ask of it."""

    def __init__(self, folder: Path, names: list[str], settings: dict[str, Any]) -> None:
        self.folder, self.names, self.settings = SweepFolder(folder), names, settings
        jobs = [Job((Task("train", (name,), {name: STEPS}),)) for name in names]
        self.keys = {job.name: job.key for job in jobs}
        self.folder.write_plan(
            {"jobs": [j.to_dict() for j in jobs], "common": [str(folder)], "launcher": settings, "submissions": []}
        )

    def submit(self) -> dict[str, str]:
        """Start what is missing, as `vlaexp sweep submit` and `resume` do; SLURM's ids by point."""
        plan = self.folder.read_plan()
        statuses, _ = job_statuses(self.folder, plan)
        keys = [key for key, status in statuses.items() if status.state != "finished" and not status.active]
        ids = scheduler.submit(self.folder.path, work, keys, self.settings, "sweep")
        submission = {"kind": "slurm", "time": time.time(), "jobs": ids}
        self.folder.write_plan(plan | {"submissions": [*plan["submissions"], submission]})
        return {name: ids[key] for name, key in self.keys.items() if key in ids}

    def state(self, name: str) -> str:
        return self.status()[name]["state"]

    def status(self) -> dict[str, dict[str, Any]]:
        rows, _ = point_rows(self.folder)
        return {row["point"]: row for row in rows}

    def starts(self, name: str) -> list[int]:
        """The steps at which a point began."""
        file = self.folder.path / name / "starts"
        return [int(line) for line in file.read_text().split()] if file.exists() else []

    def under_way(self, name: str, step: int = 7) -> Callable[[], bool]:
        lines = self.folder.path / name / "metrics.jsonl"
        return lambda: lines.exists() and len(lines.read_text().splitlines()) >= step

    def check_complete(self, *but: str) -> None:
        """Every point but those is finished with the numbers of an undisturbed run, each step once."""
        for name in [name for name in self.names if name not in but]:
            wait_for(lambda name=name: self.state(name) == "finished", 90, lambda name=name: str(self.status()[name]))
            rows = [json.loads(line) for line in (self.folder.path / name / "metrics.jsonl").read_text().splitlines()]
            assert [row["step"] for row in rows] == [*range(1, STEPS + 1)]
            assert rows[-1]["x"] == final(name)


@pytest.fixture
def sweep(slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Sweep]:
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), *filter(None, sys.path)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))

    def make(*names: str, folder: str = "sweep", **settings: Any) -> Sweep:
        (tmp_path / folder).mkdir()
        return Sweep(tmp_path / folder, [*names], LAUNCHER | settings)

    return make


GRID = [f"r{rank}-{seed}" for rank in (8, 16) for seed in (0, 1, 2)]


def test_a_grid_runs_to_the_end_and_again_runs_nothing(sweep):
    grid = sweep(*GRID)
    ids = grid.submit()
    assert [*ids] == GRID
    grid.check_complete()
    assert {row["restarts"] for row in grid.status().values()} == {0}
    assert {row["node"] for row in grid.status().values()} <= {"n1", "n2"}
    work(str(grid.folder.path), grid.keys[GRID[0]])
    assert grid.starts(GRID[0]) == [0]


def test_a_point_that_raises_fails_in_slurms_eyes_too(sweep, slurm):
    grid = sweep("a", "bad", "b")
    ids = grid.submit()
    grid.check_complete("bad")
    wait_for(lambda: grid.state("bad") == "failed", 30, "bad is not failed")
    assert grid.status()["bad"]["note"] == "UserError: this point is wrong; mend it"
    wait_for(lambda: slurm.states(ids["bad"])[ids["bad"]] == "FAILED", 30, "SLURM does not know")
    wait_for(lambda: slurm.states(ids["a"])[ids["a"]] == "COMPLETED", 30, "SLURM does not know of the good one")


def test_a_cancelled_point_saves_and_resumes(sweep, slurm):
    grid = sweep("a", "b")
    ids = grid.submit()
    wait_for(grid.under_way("a"), 60, "a does not run")
    slurm.cancel(ids["a"])
    wait_for(lambda: grid.state("a") == "cancelled", 60, lambda: str(grid.status()["a"]))
    grid.check_complete("a")
    stopped = json.loads((grid.folder.path / "a" / "checkpoint.json").read_text())["step"]
    assert stopped >= 7
    assert [*grid.submit()] == ["a"]
    grid.check_complete()
    assert grid.starts("a") == [0, stopped]
    assert grid.starts("b") == [0]


def test_a_requeued_point_goes_on(sweep, slurm):
    grid = sweep("a", "b")
    ids = grid.submit()
    wait_for(grid.under_way("a"), 60, "a does not run")
    slurm.requeue(ids["a"])
    grid.check_complete()
    assert grid.starts("a")[1] >= 7
    assert grid.status()["a"]["restarts"] == 1


def test_a_point_out_of_time_puts_itself_back_but_not_for_ever(sweep, slurm):
    grid = sweep("a", "b")
    ids = grid.submit()
    for again in range(3):
        wait_for(grid.under_way("a", 7 + 8 * again), 60, "a does not run")
        slurm.run("scancel", "--signal=USR2", ids["a"])
        if again < 2:
            wait_for(lambda: slurm.states(ids["a"])[ids["a"]] == "PENDING", 60, "a did not put itself back")
            assert grid.state("a") == "pending"
            slurm.release(ids["a"])
    wait_for(lambda: grid.state("a") == "interrupted", 60, lambda: str(grid.status()["a"]))
    assert "put back into the queue 2 times" in grid.status()["a"]["note"]
    grid.submit()
    grid.check_complete()
    assert len(grid.starts("a")) == 4
    assert sorted(grid.starts("a")) == grid.starts("a")


def test_slurms_own_time_limit(sweep, slurm):
    grid = sweep("a", timeout_min=1, signal_delay_s=50)  # SIGUSR2 10 s after the start, or a little before
    ids = grid.submit()
    wait_for(lambda: grid.state("a") == "running", 60, "a does not run")
    wait_for(lambda: slurm.states(ids["a"])[ids["a"]] == "PENDING" or grid.state("a") == "finished", 60, "no signal")
    if grid.state("a") != "finished":
        slurm.release(ids["a"])
    grid.check_complete()


def test_a_lost_node_comes_back(sweep, slurm):
    grid = sweep(*GRID[:4])
    ids = grid.submit()
    for name in GRID[:4]:
        wait_for(grid.under_way(name), 60, f"{name} does not run")
    slurm.node_down("n1")
    lost = [name for name in GRID[:4] if grid.status()[name]["node"] == "n1"]
    assert len(lost) == 2
    for name in lost:
        wait_for(lambda name=name: grid.state(name) == "pending", 60, lambda: str(grid.status()))
    slurm.node_up("n1")
    for name in lost:
        slurm.release(ids[name])
    grid.check_complete()
    assert sum(len(grid.starts(name)) for name in GRID[:4]) == 6  # two began again, from their periodic checkpoints
    assert all(grid.starts(name)[-1] in (0, 5, 10, 15, 20, 25, 30, 35) for name in GRID[:4])


def test_a_controller_that_restarts(sweep, slurm):
    grid = sweep("a", "b")
    grid.submit()
    wait_for(grid.under_way("a"), 60, "a does not run")
    slurm.stop_controller()
    row = grid.status()["a"]  # answers at once from the files
    assert row["state"] in ("running", "unknown")
    with pytest.raises(scheduler.SlurmUnavailableError):
        scheduler.queue()
    slurm.start_controller()
    grid.check_complete()
    assert grid.starts("a") == [0]


def test_a_parent_killed_after_submission_changes_nothing(sweep):
    grid = sweep("a", "b")
    code = (
        "import json, os, signal, sys\nfrom pathlib import Path\nfrom test_slurm_faults import work\n"
        "from vlaexp.sweep import slurm\n"
        "ids = slurm.submit(Path(sys.argv[1]), work, sys.argv[3:], json.loads(sys.argv[2]), 'sweep')\n"
        "print(json.dumps(ids), flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    arguments = [str(grid.folder.path), json.dumps(grid.settings), *grid.keys.values()]
    parent = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert parent.returncode == -signal.SIGKILL, parent.stderr
    grid.check_complete()


def test_two_sweeps_at_once(sweep):
    grids = [sweep("a", "b", folder=folder) for folder in ("one", "two")]
    for grid in grids:
        grid.submit()
    for grid in grids:
        grid.check_complete()


def test_everything_was_killed(sweep, slurm):
    grid = sweep(*GRID[:4])
    ids = grid.submit()
    wait_for(grid.under_way(GRID[0], 12), 60, "nothing runs")
    slurm.cancel(next(iter(ids.values())).split("_")[0])
    for name in GRID[:4]:
        wait_for(lambda name=name: grid.state(name) in ("cancelled", "finished"), 60, lambda: str(grid.status()))
    finished = [name for name in GRID[:4] if grid.state(name) == "finished"]
    assert sorted([*grid.submit(), *finished]) == sorted(GRID[:4])
    grid.check_complete()
    assert all(len(grid.starts(name)) <= 2 for name in GRID[:4])


def test_a_killed_process_is_seen_and_its_point_resumed(sweep, slurm):
    grid = sweep("a", "b")
    ids = grid.submit()
    wait_for(grid.under_way("a"), 60, "a does not run")
    os.kill(grid.folder.state(grid.keys["a"])["pid"], signal.SIGKILL)
    wait_for(lambda: grid.state("a") == "died", 60, lambda: str(grid.status()["a"]))
    assert grid.status()["a"]["note"] == "FAILED"
    assert slurm.states(ids["a"])[ids["a"]] == "FAILED"
    assert [*grid.submit()] == ["a"]
    grid.check_complete()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"partition": "gold"}, r"invalid partition specified: gold.*change hydra.launcher.partition=gold \(sinfo"),
        ({"gpus_per_node": 64}, r"SLURM refused the array: .*; change hydra.launcher.gpus_per_node=64"),
        ({"nonsense": 1}, r"hydra/launcher=slurm: Unavailable parameter\(s\): \['nonsense'\]; its keys"),
    ],
)
def test_what_sbatch_refuses(sweep, settings, message):
    grid = sweep("a", **settings)
    with pytest.raises(UserError, match=message):
        grid.submit()
    assert grid.state("a") == "missing"


def test_no_slurm_here(sweep, monkeypatch, tmp_path):
    grid = sweep("a")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"there is no SLURM on this machine .* or use hydra/launcher=local"):
        grid.submit()
    assert scheduler.accounting(["1_0"]) == {}
