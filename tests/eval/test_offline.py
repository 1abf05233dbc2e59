"""Held-out error and its trivial baselines on data made by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vlaexp.data_types import ActionChunk, Batch, Observation
from vlaexp.env.tabletop.env import JOINT_SPEC
from vlaexp.eval.offline import held_out_error

H, A = 2, JOINT_SPEC.dim


def batch(action: float, state: float, padded: bool = False, width: int = A) -> Batch:
    """One row of constant actions; where padded, the second step is beyond the end."""
    return Batch(
        Observation({}, torch.full((1, 1, width), state), ["go"]),
        torch.full((1, H, A), action) + torch.tensor([0.0, 100.0 if padded else 0.0])[None, :, None],
        torch.tensor([[False, padded]]),
    )


class AlwaysOne(SimpleNamespace):
    device = "cpu"
    spec = JOINT_SPEC

    def predict_action(self, observation):
        return ActionChunk(torch.ones(observation.batch_size, H, A), self.spec)


MEAN = np.full((H, A), 2.0)


def test_errors_are_means_over_real_steps():
    result = held_out_error(AlwaysOne(), [batch(1.5, 1.0), batch(3.0, 3.5, padded=True)], MEAN)
    assert result["steps"] == 3
    assert result["policy_mse"] == pytest.approx((2 * 0.25 + 4.0) / 3)
    assert result["mean_action_mse"] == pytest.approx((2 * 0.25 + 1.0) / 3)
    assert result["repeat_state_mse"] == pytest.approx((2 * 0.25 + 0.25) / 3)
    assert result["beats"] == {"mean_action": False, "repeat_state": False}
    assert result["policy_mse_by_dimension"] == pytest.approx(dict.fromkeys(JOINT_SPEC.names, 1.5))
    assert result["mean_action_mse_by_dimension"] == pytest.approx(dict.fromkeys(JOINT_SPEC.names, 0.5))


def test_a_perfect_policy_beats_both():
    result = held_out_error(AlwaysOne(), [batch(1.0, 0.0)], MEAN)
    assert (result["policy_mse"], result["mean_action_mse"], result["repeat_state_mse"]) == (0.0, 1.0, 1.0)
    assert all(result["beats"].values())


def test_a_state_of_another_width_cannot_be_repeated():
    result = held_out_error(AlwaysOne(), [batch(1.0, 0.0, width=A + 1)], MEAN)
    assert "repeat_state_mse" not in result
    assert set(result["beats"]) == {"mean_action"}
