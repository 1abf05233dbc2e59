"""Two finished and evaluated trainings that tests of comparing and reporting share."""

from pathlib import Path

import pytest

from vlaexp.config import compose
from vlaexp.workflow.train import TrainResult, train


@pytest.fixture(scope="session")
def brief() -> list[str]:
    """Three episodes side by side in this process."""
    return ["eval=nominal", "eval.episodes=3", "eval.num_envs=3", "eval.workers=0", "eval.videos=1"]


@pytest.fixture(scope="session")
def shrunk(shared_outputs: Path) -> list[str]:
    """As `small`, in the outputs folder of the session and with two steps."""
    return [
        "dataset=tabletop_pick",
        "dataset.val_fraction=0.25",
        "model.weights=null",
        "lora=r4",
        "trainer=cpu",
        "trainer.max_steps=2",
        "trainer.batch_size=8",
        "trainer.log_interval=1",
        "trainer.val_interval=2",
        f"outputs={shared_outputs}",
    ]


@pytest.fixture(scope="session")
def runs(shrunk: list[str], brief: list[str]) -> dict[str, TrainResult]:
    """head=joint and head=ee_delta with LoRA of rank 4, evaluated on three episodes, logged to MLflow."""
    return {
        head: train(compose("train", [*shrunk, *brief, f"head={head}", f"name=tiny_{head}"]))
        for head in ("joint", "ee_delta")
    }
