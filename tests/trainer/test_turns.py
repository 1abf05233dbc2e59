"""Trainings in turns: one at a time, each as alone, none stopped by another."""

import threading
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel

from vlaexp.trainer.turns import Turn, in_turns


class Noisy(BoringModel):
    """Learns from the global random generator, and writes down its steps."""

    def __init__(self, name: str, told: list[str], fails_at: int = -1) -> None:
        super().__init__()
        self.name, self.told, self.fails_at = name, told, fails_at

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.global_step == self.fails_at:
            raise ValueError(f"{self.name} fails")
        self.told.append(f"{self.name}{self.global_step}")
        return self.layer(torch.randn(4, 32)).pow(2).mean()


def learn(model: Noisy, steps: int, folder: Path, *callbacks: Callback) -> None:
    torch.manual_seed(len(model.name))
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=folder,
        callbacks=list(callbacks),
    )
    trainer.fit(model)


def make(name: str, told: list[str], fails_at: int = -1) -> Noisy:
    torch.manual_seed(0)
    return Noisy(name, told, fails_at)


def test_a_step_each_and_each_as_alone(tmp_path: Path) -> None:
    told: list[str] = []
    steps = {"a": 3, "bb": 2, "ccc": 4}
    models = [make(name, told) for name in steps]
    works = {
        i: lambda turn, model=model: learn(model, steps[model.name], tmp_path, turn) for i, model in enumerate(models)
    }
    assert list(in_turns(works)) == [(1, None), (0, None), (2, None)]
    assert told == ["a0", "bb0", "ccc0", "a1", "bb1", "ccc1", "a2", "ccc2", "ccc3"]
    for model in models:
        alone = make(model.name, [])
        learn(alone, steps[model.name], tmp_path)
        assert torch.equal(alone.layer.weight, model.layer.weight)


def test_a_failure_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    told: list[str] = []
    models = [make("a", told, fails_at=1), make("b", told)]
    works = {i: lambda turn, model=model: learn(model, 3, tmp_path, turn) for i, model in enumerate(models)}
    (first, error), second = in_turns(works)
    assert first == 0
    assert isinstance(error, ValueError)
    assert second == (1, None)
    assert told == ["a0", "b0", "b1", "b2"]


def test_what_waits_is_stopped_with_the_pack(tmp_path: Path) -> None:
    closed: list[str] = []

    def work(turn: Turn, name: str) -> None:
        try:
            learn(make(name, []), 3, tmp_path, turn)
        finally:
            closed.append(name)

    works = {0: lambda turn: None, 1: lambda turn: work(turn, "b"), 2: lambda turn: work(turn, "c")}
    turns = in_turns(works)
    threads = threading.active_count()
    assert next(turns) == (0, None)
    turns.close()
    assert closed == []  # none had begun
    works = {0: lambda turn: work(turn, "a"), 1: lambda turn: learn(make("b", []), 1, tmp_path, turn)}
    turns = in_turns(works)
    assert next(turns) == (1, None)
    turns.close()
    assert closed == ["a"]
    assert threading.active_count() == threads


def test_filters_of_warnings_are_given_back(tmp_path: Path) -> None:
    before = list(warnings.filters)

    def work(turn: Turn, steps: int) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=f"of {steps}")
            learn(make("a", []), steps, tmp_path, turn)

    assert [error for _, error in in_turns({n: lambda turn, n=n: work(turn, n) for n in (1, 2)})] == [None, None]
    assert list(warnings.filters) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_each_as_alone_on_a_gpu(tmp_path: Path) -> None:
    """The generator of the GPU is handed over too."""
    draws: dict[str, list[float]] = {}

    class Drawing(Noisy):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            draws.setdefault(self.name, []).append(float(torch.randn(1, device="cuda")))
            return super().training_step(batch, batch_idx)

    for name in ("a", "b"):
        learn(Drawing(name, []), 2, tmp_path)
    alone, draws = draws, {}
    works = {i: lambda turn, name=name: learn(Drawing(name, []), 2, tmp_path, turn) for i, name in enumerate("ab")}
    assert [error for _, error in in_turns(works)] == [None, None]
    assert draws == alone
