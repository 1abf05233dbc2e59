"""Laws of the arm's kinematics: against MuJoCo, against finite differences, against itself."""

import mujoco
import numpy as np
import pytest

from vlaexp.env.tabletop import kinematics as kin
from vlaexp.env.tabletop.world import World

RNG_SEED = 0
DOWN = np.diag([1.0, -1.0, -1.0])


@pytest.fixture(scope="module")
def joint_angles() -> np.ndarray:
    """(200, 7) uniform within the limits."""
    return np.random.default_rng(RNG_SEED).uniform(kin.JOINT_LOWER, kin.JOINT_UPPER, (200, 7))


def test_forward_kinematics_is_the_pose_of_mujocos_tool_site(joint_angles: np.ndarray) -> None:
    world = World(image_size=16)
    for q in joint_angles:
        world.data.qpos[:7] = q
        mujoco.mj_kinematics(world.model, world.data)
        position, rotation = kin.forward_kinematics(q)
        np.testing.assert_allclose(position, world.tcp[0], atol=1e-7)
        np.testing.assert_allclose(rotation, world.tcp[1], atol=1e-7)


def test_joint_limits_are_those_of_the_model() -> None:
    model = World(image_size=16).model
    limits = np.array([model.joint(f"joint{i + 1}").range for i in range(kin.NUM_JOINTS)])
    np.testing.assert_allclose(limits, np.stack([kin.JOINT_LOWER, kin.JOINT_UPPER], 1))


def test_batched_forward_kinematics_equals_one_by_one(joint_angles: np.ndarray) -> None:
    positions, rotations = kin.forward_kinematics(joint_angles.reshape(20, 10, 7))
    for q, position, rotation in zip(joint_angles, positions.reshape(-1, 3), rotations.reshape(-1, 3, 3), strict=True):
        single_position, single_rotation = kin.forward_kinematics(q)
        np.testing.assert_allclose(position, single_position, atol=1e-12)
        np.testing.assert_allclose(rotation, single_rotation, atol=1e-12)


def test_jacobian_is_the_derivative_of_forward_kinematics(joint_angles: np.ndarray) -> None:
    step = 1e-6
    for q in joint_angles[:50]:
        position, rotation, jacobian = kin.jacobian(q)
        np.testing.assert_allclose(position, kin.forward_kinematics(q)[0])
        np.testing.assert_allclose(rotation, kin.forward_kinematics(q)[1])
        for joint in range(kin.NUM_JOINTS):
            ahead, ahead_rotation = kin.forward_kinematics(q + step * np.eye(7)[joint])
            back, back_rotation = kin.forward_kinematics(q - step * np.eye(7)[joint])
            linear = (ahead - back) / (2 * step)
            angular = kin.rotation_vector(ahead_rotation @ back_rotation.T) / (2 * step)
            np.testing.assert_allclose(jacobian[:, joint], np.concatenate([linear, angular]), atol=1e-6)


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-4, 0.5, 2.9, 3.1, np.pi - 1e-6])
def test_rotation_vector_inverts_rotation_matrix(angle: float) -> None:
    axes = np.random.default_rng(RNG_SEED).normal(size=(50, 3))
    vectors = angle * axes / np.linalg.norm(axes, axis=1, keepdims=True)
    matrices = kin.rotation_matrix(vectors)
    np.testing.assert_allclose(matrices @ matrices.swapaxes(-1, -2), np.broadcast_to(np.eye(3), (50, 3, 3)), atol=1e-12)
    np.testing.assert_allclose(kin.rotation_vector(matrices), vectors, atol=1e-7)


@pytest.mark.parametrize("axis", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, -1, 1)])
def test_a_half_turn_keeps_its_axis_up_to_sign(axis: tuple[int, int, int]) -> None:
    vector = np.pi * np.array(axis) / np.linalg.norm(axis)
    matrix = kin.rotation_matrix(vector)
    found = kin.rotation_vector(matrix)
    assert np.linalg.norm(found) == pytest.approx(np.pi)
    np.testing.assert_allclose(kin.rotation_matrix(found), matrix, atol=1e-9)


def test_batched_rotations_equal_one_by_one() -> None:
    vectors = np.random.default_rng(RNG_SEED).uniform(-1.5, 1.5, (4, 5, 3))
    vectors[0, 0] = [np.pi, 0.0, 0.0]  # one half turn among them sends the whole batch down another path
    matrices = kin.rotation_matrix(vectors)
    for index in np.ndindex(4, 5):
        np.testing.assert_allclose(matrices[index], kin.rotation_matrix(vectors[index]), atol=1e-12)
        np.testing.assert_allclose(
            kin.rotation_vector(matrices)[index], kin.rotation_vector(matrices[index]), atol=1e-9
        )


def test_inverse_kinematics_finds_reachable_poses_within_the_limits() -> None:
    rng = np.random.default_rng(RNG_SEED)
    for _ in range(100):
        goal_q = np.clip(kin.HOME + rng.uniform(-0.4, 0.4, 7), kin.JOINT_LOWER, kin.JOINT_UPPER)
        position, rotation = kin.forward_kinematics(goal_q)
        start = np.clip(goal_q + rng.uniform(-0.15, 0.15, 7), kin.JOINT_LOWER, kin.JOINT_UPPER)
        solution = kin.inverse_kinematics(position, rotation, start)
        assert solution.reached
        assert np.all(solution.q >= kin.JOINT_LOWER)
        assert np.all(solution.q <= kin.JOINT_UPPER)
        np.testing.assert_allclose(kin.forward_kinematics(solution.q)[0], solution.position, atol=1e-12)
        np.testing.assert_allclose(solution.position, position, atol=1e-3)
        assert np.linalg.norm(kin.rotation_vector(rotation @ solution.rotation.T)) < 1e-2


def test_every_pose_above_the_table_that_tasks_need_is_reachable() -> None:
    for x in (0.36, 0.47, 0.58):
        for y in (-0.28, 0.0, 0.28):
            for z in (0.02, 0.15):
                assert kin.inverse_kinematics(np.array([x, y, z]), DOWN, kin.HOME, iterations=100).reached, (x, y, z)


@pytest.mark.parametrize("position", [(1.5, 0.0, 0.3), (0.0, 0.0, 2.0), (0.0, -3.0, 0.5)])
def test_an_unreachable_pose_is_not_reached_and_gives_the_best_pose_met(position: tuple[float, float, float]) -> None:
    goal = np.array(position)
    solution = kin.inverse_kinematics(goal, DOWN, kin.HOME)
    assert not solution.reached
    assert np.all(solution.q >= kin.JOINT_LOWER)
    assert np.all(solution.q <= kin.JOINT_UPPER)
    np.testing.assert_allclose(kin.forward_kinematics(solution.q)[0], solution.position, atol=1e-12)

    def cost(q: np.ndarray) -> float:
        found, rotation = kin.forward_kinematics(q)
        return float(np.linalg.norm(goal - found) + 0.1 * np.linalg.norm(kin.rotation_vector(DOWN @ rotation.T)))

    assert cost(solution.q) <= cost(kin.HOME)


def test_limits_hold_even_where_they_forbid_the_goal() -> None:
    position, rotation = kin.forward_kinematics(kin.HOME + np.array([0.5, 0, 0, 0, 0, 0, 0]))
    lower, upper = kin.HOME - 0.05, kin.HOME + 0.05
    solution = kin.inverse_kinematics(position, rotation, kin.HOME, lower, upper)
    assert not solution.reached
    assert np.all(solution.q >= lower)
    assert np.all(solution.q <= upper)


@pytest.mark.parametrize("shoulder", [0.0, 0.001, 0.01])
def test_a_singular_pose_slows_the_arm_instead_of_throwing_it(shoulder: float) -> None:
    # Joints 1 and 3 share an axis where joint 2 is zero, and with 3 and 5 at a quarter turn one direction is lost.
    q = np.array([0.0, shoulder, np.pi / 2, -1.5, np.pi / 2, 1.0, 0.0])
    position, rotation, jacobian = kin.jacobian(q)
    left, strength, _ = np.linalg.svd(jacobian)
    assert strength[-1] < 0.003  # undamped, a motion of 2 cm along the lost direction takes a step of 7 rad or more
    twist = 0.02 * left[:, -1]
    for sign in (-1, 1):
        goal, goal_rotation = position + sign * twist[:3], kin.rotation_matrix(sign * twist[3:]) @ rotation
        solution = kin.inverse_kinematics(goal, goal_rotation, q)
        assert np.all(np.isfinite(solution.q))
        assert np.linalg.norm(solution.position - goal) <= np.linalg.norm(twist[:3]) + 1e-3
        assert np.abs(solution.q - q).max() < 1.0
