"""Two data-parallel processes on CPU leave one policy folder and one journal."""

import subprocess
import sys

import pytest

from vlaexp.trainer.journal import read_journal


@pytest.mark.slow
def test_two_processes_leave_one_run(small, outputs):
    command = [sys.executable, "-m", "vlaexp.cli", "train", *small, "head=joint", "name=ddp", "trainer.max_steps=2"]
    command += ["trainer.devices=2", "trainer.strategy=ddp"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = (outputs / "runs").iterdir()
    assert [path.name for path in (run / "milestones").iterdir()] == ["step_000002"]
    rows = read_journal(run)
    logged = [(step, key) for step, values in rows for key in values]
    assert len(logged) == len(set(logged)), "a step was logged twice"
    assert [step for step, values in rows if "train/loss" in values] == [1, 2]
    assert done.stdout.count("made ") == 1
