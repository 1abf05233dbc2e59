"""A training that is asked to stop saves itself at a step boundary; one that cannot save keeps what it has."""

import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlaexp import interruption
from vlaexp.config import compose
from vlaexp.errors import UserError
from vlaexp.interruption import Interrupted
from vlaexp.model.weights import read_safetensors
from vlaexp.trainer.callbacks import CHECKPOINT, checkpoint_step
from vlaexp.trainer.journal import read_journal
from vlaexp.workflow.train import train

LONG = [
    "trainer.max_steps=300",
    "trainer.checkpoint_interval=1000",
    "trainer.val_interval=20",
    "lora=r4",
    "head=joint",
]


def line(small, *overrides):
    return [sys.executable, "-m", "vlaexp.cli", "train", *small, *LONG, *overrides]


def tensors(run: Path):
    return {
        (str(file.relative_to(run)), key): value.tolist()
        for file in sorted(run.glob("milestones/**/*.safetensors"))
        for key, value in read_safetensors(file).items()
    }


def test_sigterm_saves_at_a_step_boundary_and_the_rest_is_the_same(small, outputs):
    with subprocess.Popen(line(small, "name=stopped"), stderr=subprocess.PIPE, text=True) as process:
        while (
            not (rows := [row for run in outputs.glob("runs/stopped-*") for row in read_journal(run)]) or len(rows) < 5
        ):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, text = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; the same command goes on from there" in text
    (run,) = outputs.glob("runs/stopped-*")
    saved = checkpoint_step(run / CHECKPOINT)
    assert 5 <= saved < 300
    assert read_journal(run)[-1][0] == saved
    train(compose("train", [*small, *LONG, "name=stopped"]))
    whole = train(compose("train", [*small, *LONG, "name=whole"])).run
    assert read_journal(run) == read_journal(whole)
    assert tensors(run) == tensors(whole)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(small, outputs):
    first = train(compose("train", [*small, "lora=r4", "trainer.max_steps=2"]))
    before = (first.run / CHECKPOINT).read_bytes()

    def no_more_than_20_kb() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [sys.executable, "-m", "vlaexp.cli", "train", *small, "lora=r4", "trainer.max_steps=6"]
    command += ["trainer.checkpoint_interval=3", f"name={first.run.name.rpartition('-')[0]}"]
    done = subprocess.run(command, preexec_fn=no_more_than_20_kb, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "the checkpoint of step 3 could not be written to" in done.stderr
    assert "the one of step 2 is still good: make room and run the same command again" in done.stderr
    assert (first.run / CHECKPOINT).read_bytes() == before
    assert sorted(path.name for path in first.run.glob("*.partial")) == []


def test_a_damaged_checkpoint(small):
    run = train(compose("train", [*small, "lora=r4"])).run
    (run / CHECKPOINT).write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"checkpoint.ckpt is damaged .* put a good copy back, or delete it"):
        train(compose("train", [*small, "lora=r4", "trainer.max_steps=6"]))


def test_a_signal_leaves_other_work_at_once():
    with pytest.raises(Interrupted) as stop, interruption.listening():
        signal.raise_signal(signal.SIGUSR2)
    assert (stop.value.number, stop.value.exit_status) == (signal.SIGUSR2, 128 + signal.SIGUSR2)
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL


def test_inside_deferred_the_first_signal_asks_and_the_second_insists():
    with interruption.listening(), interruption.deferred():
        assert interruption.requested() is None
        signal.raise_signal(signal.SIGTERM)
        assert interruption.requested() is signal.SIGTERM
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGTERM)
    with interruption.listening():
        assert interruption.requested() is None
