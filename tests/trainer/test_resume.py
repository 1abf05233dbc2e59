"""Train 2, resume to 4 equals train 4, bit for bit, through the true entry point."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlaexp.config import compose
from vlaexp.trainer.journal import Row, read_journal
from vlaexp.workflow.train import train


def tensors(policy: Path) -> dict[str, torch.Tensor]:
    found = load_file(policy / "head.safetensors")
    if (policy / "adapter").is_dir():
        found |= load_file(policy / "adapter" / "adapter_model.safetensors")
    return found


def training(rows: list[Row]) -> list[Row]:
    """The journal without the held-out error of a finished run: the halves were a finished run at step 2, too."""
    kept = [
        (step, {key: value for key, value in values.items() if not key.startswith("held_out/")})
        for step, values in rows
    ]
    return [(step, values) for step, values in kept if values]


@pytest.mark.parametrize(
    "choice",
    [
        ["head=flow"],
        ["head=discrete_token", "lora=none", "freeze=none"],
        ["head=joint", "trainer.accumulate_grad_batches=2", "lora.dropout=0.1", "schedule=cosine"],
    ],
)
def test_train_2_resume_to_4_equals_train_4(small: list[str], outputs: Path, choice: list[str]) -> None:
    if "schedule=cosine" in choice:
        choice = [*choice, "schedule.num_training_steps=4"]
    straight = train(compose("train", [*small, *choice, "name=straight"]))
    train(compose("train", [*small, *choice, "name=halves", "trainer.max_steps=2"]))
    halves = train(compose("train", [*small, *choice, "name=halves", "trainer.max_steps=4"]))

    one, two = tensors(straight.milestones[4]), tensors(halves.milestones[4])
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name

    rows_one, rows_two = read_journal(straight.run), read_journal(halves.run)
    assert training(rows_one) == training(rows_two)
    logged = [(step, key) for step, values in rows_two for key in values]
    assert len(logged) == len(set(logged)), "a step was logged twice"
