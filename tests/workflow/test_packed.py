"""Packed trainings equal the same trainings alone, bit for bit, and share what is frozen."""

import json
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vlaexp.config import compose
from vlaexp.errors import UserError
from vlaexp.trainer.tracking import Row, read_journal
from vlaexp.workflow.packed import train_packed
from vlaexp.workflow.train import TrainResult, train

MOMENTS = {"runtime", "commit", "created", "date"}  # of a manifest: when and in what time


@pytest.fixture
def apart(outputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second outputs folder that sees the same dataset."""
    other = tmp_path_factory.mktemp("apart")
    (other / "datasets").symlink_to(outputs / "datasets")
    return other


def policy(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Every tensor of a policy folder, and its manifest without times."""
    found = load_file(folder / "head.safetensors")
    if (folder / "adapter").is_dir():
        found |= load_file(folder / "adapter" / "adapter_model.safetensors")
    record = json.loads((folder / "manifest.json").read_text())
    kept = {key: value for key, value in record.items() if key not in ("runtime", "files", "sha256")}
    kept["config"] = {key: value for key, value in kept["config"].items() if key not in ("outputs", "tracker", "dataset")}
    return found, kept


def without_latency(rows: Sequence[Row]) -> list[Row]:
    return [(step, {k: v for k, v in values.items() if "latency" not in k}) for step, values in rows]


def assert_equal(packed: object, alone: TrainResult) -> None:
    assert isinstance(packed, TrainResult), packed
    assert packed.run.name == alone.run.name
    assert without_latency(read_journal(packed.run)) == without_latency(read_journal(alone.run))
    assert packed.held_out == alone.held_out
    assert packed.milestones.keys() == alone.milestones.keys()
    for step, folder in packed.milestones.items():
        (mine, record), (theirs, their_record) = policy(folder), policy(alone.milestones[step])
        assert record == their_record
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert torch.equal(mine[name], theirs[name]), name


@pytest.mark.parametrize(
    "choices",
    [
        [["lora=r4"], ["lora=r8", "trainer.max_steps=3", "trainer.milestones=[2]"]],
        [["head=joint", "augmentation=none"], ["head=flow", "augmentation=none"]],
        [["head=discrete_token", "lora.dropout=0.1", "freeze=all", "trainer.num_workers=1"], ["freeze=vision", "lora=none"]],
    ],
)
def test_packed_equals_alone(small: list[str], apart: Path, choices: list[list[str]]) -> None:
    together = train_packed([compose("train", [*small, *choice]) for choice in choices])
    for packed, choice in zip(together, choices, strict=True):
        assert_equal(packed, train(compose("train", [*small, *choice, f"outputs={apart}"])))
