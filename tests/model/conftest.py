"""A tiny model of the smallest sizes, and observations of noise."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vlaexp.data_types import Observation
from vlaexp.dataset.normalize import NormStats, Statistics
from vlaexp.model.tiny import TinyVLA

SIZES: dict[str, Any] = {
    "cameras": ["front", "wrist"],
    "state_dim": 8,
    "goal_dim": 5,
    "image_size": 16,
    "width": 32,
    "depth": 1,
    "num_spatial_tokens": 2,
}
INSTRUCTIONS = ["pick up the red cube", "push the blue block to the zone", "open"]


def observe(batch_size: int = 3, seed: int = 0, side: int = 16, cameras: tuple[str, ...] = ("front", "wrist")) -> Any:
    generator = torch.Generator().manual_seed(seed)
    images = {
        name: torch.randint(0, 256, (batch_size, 1, 3, side, side), generator=generator, dtype=torch.uint8)
        for name in cameras
    }
    state = torch.randn(batch_size, 1, 8, generator=generator)
    return Observation(images, state, [INSTRUCTIONS[i % 3] for i in range(batch_size)])


@pytest.fixture
def observation() -> Observation:
    return observe()


@pytest.fixture
def make_observation() -> Callable[..., Observation]:
    return observe


@pytest.fixture
def make_model() -> Callable[..., TinyVLA]:
    def make(**sizes: Any) -> TinyVLA:
        torch.manual_seed(0)
        return TinyVLA(**(SIZES | sizes)).eval()

    return make


@pytest.fixture
def model(make_model: Callable[..., TinyVLA]) -> TinyVLA:
    return make_model()


@pytest.fixture
def weights(model: TinyVLA, tmp_path: Path) -> Path:
    """A folder of weights in the format of `vlaexp pretrain`, from another seed than `make_model`'s."""
    torch.manual_seed(1)
    trunk = TinyVLA(**SIZES)
    folder = tmp_path / "weights"
    folder.mkdir()
    tensors = {name: value for name, value in trunk.state_dict().items() if not name.startswith("decoder.")}
    save_file(tensors, folder / "base.safetensors")
    values = torch.randn(20, 8).numpy()
    stats = NormStats({"state": Statistics.of(values, "mean_std")}, {}, "noise")
    stats.save(folder / "norm_stats.json")
    config = {**SIZES, "decoder_depth": 2, "training_seeds": [[100, 108]]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
