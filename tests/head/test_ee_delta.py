from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from vlaexp.action_spec import ActionSpec
from vlaexp.data_types import ActionChunk, Batch, Observation
from vlaexp.dataset.transform import accumulate, apply_to_start, relative_to_start, rotation_from_6d
from vlaexp.env.tabletop.kinematics import HOME, forward_kinematics
from vlaexp.errors import UserError
from vlaexp.head.tool_error import tool_errors
from vlaexp.trainer.build import build_head
from vlaexp.workflow.train import Parts

Make = Callable[..., Parts]
LoadBatch = Callable[[Parts, list[int]], Batch]


def random_poses(*shape: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rotation = Rotation.random(int(np.prod(shape)), random_state=seed).as_matrix().reshape(*shape, 3, 3)
    return np.concatenate([rng.uniform(-0.5, 0.5, (*shape, 3)), rotation[..., 0], rotation[..., 1]], -1)


def commands(target: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Motions from each command to the next, the first from `start`: composed by hand, one after the other."""
    deltas, before = [], start
    for step in range(target.shape[1]):
        turn = Rotation.from_matrix(
            rotation_from_6d(target[:, step, 3:]) @ np.swapaxes(rotation_from_6d(before[:, 3:]), -1, -2)
        )
        deltas.append(np.concatenate([target[:, step, :3] - before[:, :3], turn.as_rotvec()], 1))
        before = target[:, step]
    return np.stack(deltas, 1)


def test_chunk_start_round_trip() -> None:
    target, start = random_poses(20, 6), random_poses(20, seed=1)
    position, rotation = apply_to_start(relative_to_start(target, start), start)
    np.testing.assert_allclose(position, target[..., :3], atol=1e-9)
    np.testing.assert_allclose(rotation, rotation_from_6d(target[..., 3:]), atol=1e-7)


def test_chunk_start_and_step_by_step_commands_lead_to_the_same_poses() -> None:
    target, start = random_poses(20, 6), random_poses(20, seed=1)
    whole = apply_to_start(relative_to_start(target, start), start)
    stepwise = accumulate(commands(target, start), start)
    np.testing.assert_allclose(whole[0], stepwise[0], atol=1e-9)
    np.testing.assert_allclose(whole[1], stepwise[1], atol=1e-7)


def test_rotations_do_not_commute_and_are_composed_in_order() -> None:
    quarter = np.pi / 2
    deltas = np.array([[[0, 0, 0, quarter, 0, 0], [0, 0, 0, 0, 0, quarter]]], dtype=float)
    start = np.array([[0.0, 0, 0, 1, 0, 0, 0, 1, 0]])
    _, rotation = accumulate(deltas, start)
    wanted = Rotation.from_euler("xz", [90, 90], degrees=True).as_matrix()  # fixed axes: x first, then z
    np.testing.assert_allclose(rotation[0, 1], wanted, atol=1e-9)


def test_perfect_predictions_have_no_tool_error(make: Make, load_batch: LoadBatch) -> None:
    for reference in ("chunk_start", "previous_command"):
        parts = make("head=ee_delta", f"action_space.reference={reference}")
        batch = load_batch(parts, [0, 20, 50])
        errors = tool_errors(ActionChunk(batch.action, parts.demos.spec), batch)
        assert errors["tool_error_mm"] < 0.1, reference
        assert errors["tool_error_deg"] < 0.1, reference


def test_accumulated_translation_counts_with_previous_command_alone(make: Make, load_batch: LoadBatch) -> None:
    for reference, counts in (("chunk_start", False), ("previous_command", True)):
        losses = []
        for weight in (0.0, 2.0):
            parts = make("head=ee_delta", f"action_space.reference={reference}", f"head.cumulative_weight={weight}")
            head, batch = parts.head.eval(), load_batch(parts, [0, 25, 50])
            action = head.action_norm.normalize(batch.action)
            losses.append(head.loss(head.prefix(batch.observation), action, torch.ones(3, 6)).item())
        assert (losses[1] > losses[0]) == counts


def test_errors_that_cancel_along_the_chunk_cost_less_than_those_that_add_up(make: Make, load_batch: LoadBatch) -> None:
    parts = make("head=ee_delta", "action_space.reference=previous_command")
    head, batch = parts.head.eval(), load_batch(parts, [0])
    prefix = head.prefix(batch.observation)
    prediction, sign = head._prediction(prefix).detach(), torch.tensor([1.0, -1.0] * 3)
    drifting, cancelling = prediction.clone(), prediction.clone()
    drifting[..., 0] += 0.1
    cancelling[..., 0] += 0.1 * sign
    valid = torch.ones(1, 6)
    assert head.loss(prefix, drifting, valid) > 2 * head.loss(prefix, cancelling, valid)


def test_other_reference_is_refused(make: Make) -> None:
    parts = make("head=ee_delta")
    with pytest.raises(UserError, match=r"reference 'absolute'; expected chunk_start or previous_command"):
        build_head(
            parts.config, parts.head.model, replace(parts.demos.spec, reference="absolute"), parts.head.norm_stats
        )


# ---- tool error: golden values -----------------------------------------------------------------------------------


def spec_of(space: str, reference: str, dim: int) -> ActionSpec:
    names = tuple(f"d{i}" for i in range(dim))
    return ActionSpec(
        space=space,
        names=names,
        units=("rad",) * dim,
        fps=10.0,
        reference=reference,
        gripper=dim - 1,
        embodiment="tabletop_arm",
    )


def batch_of(action: torch.Tensor, target: np.ndarray, start: np.ndarray, pad: list[bool]) -> Batch:
    targets = {
        name: torch.tensor(value, dtype=torch.float32)
        for name, value in (("tool_target", target), ("tool_start", start), ("command_start", start))
    }
    observation = Observation({}, torch.zeros(1, 1, 1), ["open"])
    return Batch(observation, action, torch.tensor([pad]), targets)


IDENTITY = np.array([[0.4, 0.0, 0.2, 1, 0, 0, 0, 1, 0]])


@pytest.mark.parametrize(("reference", "mm", "deg"), [("chunk_start", 3.0, 2.0), ("previous_command", 4.5, 3.0)])
def test_tool_error_of_ee_delta(reference: str, mm: float, deg: float) -> None:
    """3 mm and 2 degrees off at each of two steps; against the previous command the second is off by twice that."""
    action = torch.zeros(1, 3, 7)
    action[:, :, 1] = 3e-3
    action[:, :, 5] = np.deg2rad(2)
    batch = batch_of(torch.zeros_like(action), np.repeat(IDENTITY[:, None], 3, 1), IDENTITY, [False, False, True])
    errors = tool_errors(ActionChunk(action, spec_of("ee_delta", reference, 7)), batch)
    assert float(errors["tool_error_mm"]) == pytest.approx(mm, rel=1e-4)
    assert float(errors["tool_error_deg"]) == pytest.approx(deg, rel=1e-4)


def test_tool_error_of_joints_goes_through_forward_kinematics() -> None:
    position, rotation = forward_kinematics(HOME)
    target = np.concatenate([position + np.array([0, 0, 5e-3]), rotation[:, 0], rotation[:, 1]])[None, None]
    action = torch.tensor([*HOME, 1.0], dtype=torch.float32)[None, None].clone()
    action[..., 6] += np.deg2rad(10)  # the last joint turns the hand on the spot
    errors = tool_errors(
        ActionChunk(action, spec_of("joint", "absolute", 8)), batch_of(action, target, target[:, 0], [False])
    )
    assert float(errors["tool_error_mm"]) == pytest.approx(5, rel=1e-3)
    assert float(errors["tool_error_deg"]) == pytest.approx(10, rel=1e-3)


def test_tool_error_is_empty_where_the_robot_is_unknown() -> None:
    action = torch.zeros(1, 1, 8)
    chunk = ActionChunk(action, replace(spec_of("joint", "absolute", 8), embodiment="foreign"))
    assert tool_errors(chunk, batch_of(action, IDENTITY[:, None], IDENTITY, [False])) == {}
    native = ActionChunk(action, spec_of("native", "absolute", 8))
    assert tool_errors(native, batch_of(action, IDENTITY[:, None], IDENTITY, [False])) == {}
