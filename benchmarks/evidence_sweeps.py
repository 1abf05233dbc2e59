"""Criteria of sweeps: a step grid costs its longest training, and a grid of a thousand points stays quick to handle."""

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.criteria import Found, measures
from benchmarks.surroundings import ROOT
from vlaexp.sweep.folder import SweepFolder
from vlaexp.sweep.grid import expand
from vlaexp.sweep.jobs import merge_steps, pack

PROGRAM = str(ROOT / ".venv" / "bin" / "vlaexp")
AXES = {
    "lora": ["r4", "r8", "r16", "r32", "r64"],
    "head": ["joint", "ee_delta", "discrete_token", "flow"],
    "seed": list(range(10)),
    "trainer.max_steps": [50, 100, 200, 400, 800],
}


@measures()
def thousand_points() -> Iterator[Found]:
    with tempfile.TemporaryDirectory() as folder:
        grid = ",".join(f"{key}:[{','.join(map(str, values))}]" for key, values in AXES.items())
        arm = f'+arms.a={{overrides:["dataset=tabletop_pick","trainer=cpu"],grid:{{{grid}}}}}'
        dry, text = _median(["sweep", "submit", "name=big", arm, f"outputs={folder}", "dry_run=true", "format=json"])
        assert json.loads(text)["points"] == 1000
        yield Found("dry submission of 1,000 points, median seconds", dry, "<= 10", 3)
        _synthetic_sweep(Path(folder) / "big")
        status, text = _median(["sweep", "status", "name=big", f"outputs={folder}", "format=json"])
        assert len(json.loads(text)["points"]) == 1000
        yield Found("status over 1,000 points, median seconds", status, "<= 5", 3)


@measures(long=True)
def step_grid_cost() -> Iterator[Found]:
    """One training with milestones beside the longest alone, in turns; and beside its three lengths one by one."""
    with tempfile.TemporaryDirectory() as folder:
        record = [PROGRAM, "record", "dataset=tabletop_pick", "episodes=20", f"outputs={folder}"]
        subprocess.run(record, check=True, capture_output=True)
        together, alone, naive = [], [], []
        for turn in range(3):
            together.append(_seconds(folder, f"grid{turn}", 600, [150, 300]))
            alone.append(_seconds(folder, f"alone{turn}", 600, []))
            naive.append(alone[-1] + sum(_seconds(folder, f"short{turn}-{n}", n, []) for n in (150, 300)))
        ratio = statistics.median(together) / statistics.median(alone)
        yield Found("step grid 150, 300, 600 as milestones: time over the longest training", ratio, "<= 1.05", 3)
        naive_ratio = statistics.median(naive) / statistics.median(together)
        yield Found("the three lengths one by one: time over the step grid", naive_ratio, ">= 1.4", 3)


def _median(arguments: list[str]) -> tuple[float, str]:
    times, text = [], ""
    for _ in range(3):
        began = time.perf_counter()
        text = subprocess.run([PROGRAM, *arguments], check=True, capture_output=True, text=True, cwd=ROOT).stdout
        times.append(time.perf_counter() - began)
    return statistics.median(times), text


def _seconds(outputs: str, name: str, steps: int, milestones: list[int]) -> float:
    """Seconds from the first step to the last policy folder, of a training in a process of its own."""
    settings = [f"trainer.max_steps={steps}", f"trainer.milestones={milestones}", "trainer=cpu", "tracker=csv"]
    command = [PROGRAM, "train", "dataset=tabletop_pick", *settings, f"name={name}", f"outputs={outputs}"]
    subprocess.run(command, check=True, capture_output=True)
    (folder,) = Path(outputs).glob(f"runs/{name}-*/milestones/step_{steps:06d}")
    return json.loads((folder / "manifest.json").read_text())["runtime"]["seconds"]


def _synthetic_sweep(path: Path) -> None:
    """A sweep of which every point is finished and evaluated on two splits."""
    folder = SweepFolder(path)
    summary = json.dumps({"success_rate": 0.5, "outcomes": [True, False] * 50})
    progress = json.dumps({"step": 800, "max_steps": 800, "steps_per_s": 9.0, "train/loss": 1})
    jobs = pack(merge_steps(expand({"a": {"grid": AXES}}), lambda _: False), "none")
    folder.write_plan({"jobs": [job.to_dict() for job in jobs], "common": [], "launcher": {}, "submissions": []})
    for job in jobs:
        (task,) = job.tasks
        run = path / "runs" / job.key
        for step in task.points.values():
            for split in ("nominal", "shifted"):
                evidence = run / "milestones" / f"step_{step:06d}" / "eval" / split
                evidence.mkdir(parents=True)
                (evidence / "summary.json").write_text(summary)
        (run / "progress.json").write_text(progress)
        folder.update_state(job.key, state="finished", made=[str(run)], runs={task.name: str(run)})
