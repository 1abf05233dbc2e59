"""One trained policy folder for the session, and copies of it to damage."""

import shutil
from pathlib import Path

import pytest
import torch

from vlaexp.config import compose
from vlaexp.workflow.train import TrainResult, train

SMALL = ["dataset=tabletop_pick", "dataset.val_fraction=0.25", "model.weights=null", "trainer=cpu", "tracker=csv"]
TINY = ["model.image_size=16", "model.width=32", "model.depth=1", "model.decoder_depth=1", "action_horizon=6"]
SHORT = ["trainer.max_steps=2", "trainer.batch_size=8", "trainer.checkpoint_interval=1", "trainer.val_interval=1"]


@pytest.fixture
def tiny(small: list[str]) -> list[str]:
    """The shrunk training on a model of the smallest sizes."""
    torch.set_num_threads(1)
    return [*small, *TINY, "augmentation=none", "name=tiny"]


@pytest.fixture(scope="session")
def trained(shared_outputs: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """Two steps of `head=ee_delta lora=r4`."""
    outputs = tmp_path_factory.mktemp("trained")
    (outputs / "datasets").symlink_to(shared_outputs / "datasets")
    return train(compose("train", [*SMALL, *TINY, *SHORT, "lora=r4", f"outputs={outputs}", "name=trained"]))


@pytest.fixture
def policy(trained: TrainResult, tmp_path: Path) -> Path:
    """A copy of the trained policy folder."""
    return Path(shutil.copytree(trained.milestones[2], tmp_path / "policy"))
