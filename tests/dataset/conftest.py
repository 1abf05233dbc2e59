"""Hand-made columns whose numbers say where they come from, and recordings small enough to make in a test."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from vlaexp.dataset.batches import Columns
from vlaexp.dataset.demonstrations import ActionSpace, Demonstrations
from vlaexp.env.tabletop.env import EE_DELTA_SPEC

LENGTHS = (3, 5, 1)


class NumberedFrames:
    """Images whose every pixel is the index of their frame."""

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        return np.broadcast_to(indices.astype(np.uint8)[:, None, None, None], (len(indices), 3, 2, 2)).copy()


def random_poses(count: int, seed: int) -> np.ndarray:
    """(count, 9): position and the first two columns of a rotation."""
    rng = np.random.default_rng(seed)
    rotation = Rotation.random(count, rng=rng).as_matrix()
    return np.concatenate([rng.normal(size=(count, 3)), rotation[:, :, 0], rotation[:, :, 1]], 1)


@pytest.fixture(name="random_poses")
def _random_poses() -> Callable[[int, int], np.ndarray]:
    return random_poses


@pytest.fixture
def frames() -> NumberedFrames:
    return NumberedFrames()


@pytest.fixture
def columns() -> Columns:
    """Episodes of 3, 5 and 1 frames; action and state are 100 times and once the frame's index, plus the dimension."""
    count = sum(LENGTHS)
    index = np.arange(count, dtype=np.float64)[:, None]
    ends = np.cumsum(LENGTHS)
    action = 100 * index + np.arange(7)
    action[:, 6] = np.arange(count) % 2
    return Columns(
        action=action,
        state=index + np.arange(4) / 10,
        episode_start=ends - LENGTHS,
        episode_end=ends,
        instructions=[f"do {i}" for i in range(count)],
        spec=EE_DELTA_SPEC,
        tool_target=random_poses(count, 0),
        tool_pose=random_poses(count, 1),
    )


@pytest.fixture
def recorded(shared_outputs: Path) -> Path:
    """The session's dataset of 8 demonstrations."""
    return shared_outputs / "datasets" / "tabletop_pick"


@pytest.fixture
def load(recorded: Path, tmp_path: Path) -> Callable[..., Demonstrations]:
    """Loads a dataset as training sees it; without arguments the session's, as ee_delta against the chunk's start."""

    def make(space: str = "ee_delta", reference: str = "chunk_start", horizon: int = 12, **settings: Any):
        settings = {"name": "test", "outputs": str(tmp_path), "root": str(recorded), "val_fraction": 0.25} | settings
        return Demonstrations(ActionSpace(space, reference), horizon, **settings)

    return make


@pytest.fixture(scope="session")
def record_into() -> Callable[..., dict[str, Any]]:
    """Records through the verb's own function; one worker and two episodes unless overridden."""
    from vlaexp.config import compose
    from vlaexp.workflow.record import record

    def run(root: Path, *overrides: str) -> dict[str, Any]:
        defaults = ["dataset=tabletop_pick", "episodes=2", "workers=1", f"dataset.root={root}"]
        return record(compose("record", [*defaults, *overrides]))

    return run
