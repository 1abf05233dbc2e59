"""Rows of a comparison made by hand: what `collect` would read from the evidence of evaluated policies."""

import json
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vlaexp.eval.statistics import wilson_interval
from vlaexp.report.collect import Row


def make_row(rate: float = 0.5, episodes: int = 100, **changes: Any) -> Row:
    """A row of a trained policy whose outcomes are drawn at `rate`; `changes` replace its fields."""
    row: Row = {
        "run": "flow_r16",
        "role": "trained",
        "base": "tiny",
        "head": "flow",
        "decoder": changes.get("head", "flow"),
        "action_space": "ee_delta",
        "lora": "r16",
        "freeze": "vision,projector,language",
        "dataset": "tabletop_moved_camera",
        "seed": 0,
        "steps": 3000,
        "trainable_parameters": 451_319,
        "split": "nominal",
        "smoothness": 12.5,
        "seam_jump_mm": 1.25,
        "latency": 4.0,
        "latency_p95": 5.5,
        "mean_steps": 30.0,
        "unreachable_per_episode": 0.0,
        "success_by_family": {"pick": rate},
        "question": "the domain it was trained for, on new layouts",
        "folder": "/nowhere/eval/nominal",
    } | changes
    seed = zlib.crc32(f"{row['run']} {row['steps']} {row['split']}".encode())
    outcomes = [bool(hit) for hit in np.random.default_rng(seed).random(episodes) < rate]
    low, high = wilson_interval(sum(outcomes), episodes)
    measured = {
        "episodes": episodes,
        "successes": sum(outcomes),
        "success_rate": sum(outcomes) / episodes,
        "ci_low": low,
        "ci_high": high,
        "episodes_key": json.dumps([900_000, episodes, row["split"]]),
        "outcomes": outcomes,
    }
    return measured | row


@pytest.fixture(name="make_row", scope="session")
def _make_row() -> Callable[..., Row]:
    return make_row
