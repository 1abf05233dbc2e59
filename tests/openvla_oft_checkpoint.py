"""A tiny checkpoint in OpenVLA-OFT's format: that of `openvla_checkpoint`, and the files that OFT writes beside it.

Nothing here needs vlaexp: the reference implementation was given the same weights and the same inputs.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvla_checkpoint as published
import torch

WIDTH, ACTION_DIM, STATE_DIM, HORIZON = 32, 7, 8, 8  # LIBERO's, on a tiny language model
KEY = "libero_spatial_no_noops"
PARTS = ("action_head", "proprio_projector")


def shapes(name: str, action_dim: int = ACTION_DIM, state_dim: int = STATE_DIM) -> dict[str, list[int]]:
    """Of the reference's own state dicts."""
    if name == "proprio_projector":
        layers = {"fc1": [WIDTH, state_dim], "fc2": [WIDTH, WIDTH]}
    else:
        blocks = {f"model.mlp_resnet_blocks.{i}.ffn": WIDTH for i in range(2)}
        layers = {"model.layer_norm1": [WIDTH * action_dim], "model.fc1": [WIDTH, WIDTH * action_dim]}
        for block, width in blocks.items():
            layers |= {f"{block}.0": [width], f"{block}.1": [width, width]}
        layers |= {"model.layer_norm2": [WIDTH], "model.fc2": [action_dim, WIDTH]}
    return {
        f"{layer}.{kind}": shape[:length]
        for layer, shape in layers.items()
        for kind, length in (("weight", 2), ("bias", 1))
    }


STATISTICS: dict[str, Any] = {
    KEY: {
        "action": {
            "mean": [0.01] * 7,
            "std": [0.1] * 7,
            "min": [-0.9] * 6 + [0.0],
            "max": [0.9] * 6 + [1.0],
            "q01": [-0.02 * (i + 1) for i in range(6)] + [0.0],  # one is a fiftieth of another
            "q99": [0.01 * (i + 1) ** 2 for i in range(6)] + [1.0],
            "mask": [True] * 6 + [False],
        },
        "proprio": {
            "mean": [0.0] * 8,
            "std": [0.3] * 8,
            "min": [-1.5] * 8,
            "max": [1.5] * 8,
            "q01": [-1.0, -0.5, 0.1, -3.0, -2.0, -1.0, 0.001, -0.04],
            "q99": [1.0, 0.5, 1.3, 3.0, 2.0, 1.0, 0.04, -0.001],
        },
        "num_transitions": 1000,
        "num_trajectories": 10,
    }
}
STATES = np.random.RandomState(8).uniform(-1.2, 1.2, (2, STATE_DIM))  # some lie beyond the quantiles


def state_dict(name: str, prefix: str = "", **sizes: int) -> dict[str, torch.Tensor]:
    """Weights of `action_head` or `proprio_projector`; `prefix` is `module.` where they were trained with DDP."""
    return {
        prefix + key: torch.from_numpy(published.tensor(f"{name}.{key}", shape))
        for key, shape in shapes(name, **sizes).items()
    }


def write(folder: Path, parts: Sequence[str] = PARTS, **sizes: int) -> Path:
    """Write the checkpoint as OFT does after 150,000 steps on several GPUs."""
    published.write(folder)
    (folder / "dataset_statistics.json").write_text(json.dumps(STATISTICS))
    for name in parts:
        torch.save(state_dict(name, "module.", **sizes), folder / f"{name}--150000_checkpoint.pt")
    return folder


def pictures() -> Mapping[str, np.ndarray]:
    """By camera, (row, height, width, 3) uint8."""
    first = published.images()
    return {"front": first, "wrist": first[::-1, :, ::-1].copy()}


def recorded() -> Mapping[str, np.ndarray]:
    """What the reference implementation gave; tests/model/test_openvla_oft.py says how."""
    return np.load(Path(__file__).with_name("openvla_oft_golden.npz"))
