"""Held-out action error against trivial baselines: the measure where no simulator can follow.

`repeat_state` holds the current measured state for the whole chunk (for actions of the same dimensions as the state);
`mean_action` predicts the training mean of every step. A model that beats neither has learned nothing.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from vlaexp.data_types import Batch
from vlaexp.head.base import Head


def held_out_error(head: Head, batches: Iterable[Batch], mean_action: np.ndarray) -> dict[str, Any]:
    """Mean squared error over real steps, in squared physical units, of the head and both baselines.

    Args:
        head: in evaluation mode.
        batches: held-out data.
        mean_action: (H, A), from the training episodes.
    """
    squared: dict[str, list[torch.Tensor]] = {"policy": [], "mean_action": [], "repeat_state": []}
    mean = torch.as_tensor(mean_action, dtype=torch.float32)
    with torch.inference_mode():
        for batch in batches:
            valid = ~batch.action_is_pad
            prediction = head.predict_action(batch.observation.to(head.device)).action.cpu()
            squared["policy"].append(((prediction - batch.action) ** 2)[valid])
            squared["mean_action"].append(((mean.expand_as(batch.action) - batch.action) ** 2)[valid])
            state = batch.observation.state[:, -1:]
            if state.shape[-1] == batch.action.shape[-1]:
                still = torch.zeros_like(state) if head.spec.reference == "measured_state" else state
                squared["repeat_state"].append(((still.expand_as(batch.action) - batch.action) ** 2)[valid])
    errors = {name: torch.cat(parts) for name, parts in squared.items() if parts}
    result: dict[str, Any] = {f"{name}_mse": float(error.mean()) for name, error in errors.items()}
    result["steps"] = len(errors["policy"])
    result["beats"] = {name: result["policy_mse"] < result[f"{name}_mse"] for name in errors if name != "policy"}
    for name, error in errors.items():
        result[f"{name}_mse_by_dimension"] = dict(zip(head.spec.names, error.mean(0).tolist(), strict=True))
    return result
