"""Action representations: each transform undoes its inverse."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from vlaexp.dataset.transform import accumulate, apply_to_start, relative_to_start, rotation_from_6d


def test_a_rotation_survives_its_6d_form(random_poses):
    rotation = Rotation.random(100, rng=np.random.default_rng(0)).as_matrix()
    columns = np.concatenate([rotation[:, :, 0], rotation[:, :, 1]], 1)
    np.testing.assert_allclose(rotation_from_6d(columns), rotation, atol=1e-12)


def test_any_six_numbers_become_a_rotation():
    rotation = rotation_from_6d(np.random.default_rng(0).normal(size=(4, 25, 6)))
    np.testing.assert_allclose(
        rotation @ np.swapaxes(rotation, -1, -2), np.broadcast_to(np.eye(3), (4, 25, 3, 3)), atol=1e-9
    )
    np.testing.assert_allclose(np.linalg.det(rotation), 1.0)


def test_apply_to_start_undoes_relative_to_start(random_poses):
    target, start = random_poses(60, 0).reshape(12, 5, 9), random_poses(12, 1)
    position, rotation = apply_to_start(relative_to_start(target, start), start)
    np.testing.assert_allclose(position, target[..., :3], atol=1e-12)
    np.testing.assert_allclose(rotation, rotation_from_6d(target[..., 3:]), atol=1e-9)


def test_relative_to_start_undoes_apply_to_start(random_poses):
    rng = np.random.default_rng(0)
    direction = rng.normal(size=(12, 5, 3))
    turn = direction / np.linalg.norm(direction, axis=-1, keepdims=True) * rng.uniform(0, 3.1, (12, 5, 1))
    delta, start = np.concatenate([rng.normal(size=(12, 5, 3)), turn], -1), random_poses(12, 1)
    position, rotation = apply_to_start(delta, start)
    target = np.concatenate([position, rotation[..., 0], rotation[..., 1]], -1)
    np.testing.assert_allclose(relative_to_start(target, start), delta, atol=1e-9)


def test_a_target_at_the_start_is_zero_and_both_parts_are_in_the_world_frame():
    quarter = Rotation.from_euler("z", 90, degrees=True).as_matrix()
    start = np.array([[1.0, 2.0, 3.0, *quarter[:, 0], *quarter[:, 1]]])
    turned = Rotation.from_euler("x", 0.2).as_matrix() @ quarter  # about the x axis of the world, not of the tool
    target = np.array([[start[0], [1.5, 2.0, 3.0, *turned[:, 0], *turned[:, 1]]]])
    np.testing.assert_allclose(relative_to_start(target, start)[0], [[0] * 6, [0.5, 0, 0, 0.2, 0, 0]], atol=1e-9)


@pytest.mark.parametrize("steps", [1, 6])
def test_accumulated_deltas_lead_to_the_targets_they_were_taken_from(random_poses, steps):
    path = random_poses(4 * (steps + 1), 3).reshape(4, steps + 1, 9)
    delta = np.concatenate([relative_to_start(path[:, i + 1 : i + 2], path[:, i]) for i in range(steps)], 1)
    position, rotation = accumulate(delta, path[:, 0])
    np.testing.assert_allclose(position, path[:, 1:, :3], atol=1e-9)
    np.testing.assert_allclose(rotation, rotation_from_6d(path[:, 1:, 3:]), atol=1e-9)
