"""Two data-parallel processes on CPU leave one policy folder and one journal, and train as one process would."""

import subprocess
import sys

import pytest
import torch

from vlaexp.model.weights import read_safetensors
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


STILL = ["model.state_dropout=0.0", "model.state_noise=0.0", "model.plan_noise=0.0", "augmentation=none"]
ONE_STEP = ["head=joint", "action_horizon=1", "n_action_steps=1", "lora=r4", "freeze=all"]


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_same_global_batch(small, outputs):
    """With nothing random and no padding; each process has its half of every batch."""
    ends = []
    for devices, size in ((1, 8), (2, 4)):
        keys = [*small, *STILL, *ONE_STEP, f"name=devices{devices}", f"trainer.batch_size={size}"]
        keys += [f"trainer.devices={devices}", f"trainer.strategy={'ddp' if devices > 1 else 'auto'}"]
        command = [sys.executable, "-m", "vlaexp.cli", "train", *keys, "trainer.max_steps=3"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        (folder,) = outputs.glob(f"runs/devices{devices}-*/milestones/step_000003")
        files = (folder / "head.safetensors", folder / "adapter" / "adapter_model.safetensors")
        ends.append({name: value for file in files for name, value in read_safetensors(file).items()})
    one, two = ends
    assert any(name.endswith("lora_B.weight") and value.any() for name, value in one.items())
    assert one.keys() == two.keys()
    for name, value in one.items():
        # AdamW divides a gradient by its own size, so that rounding moves weights whose gradient is nearly zero
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5, msg=name)
