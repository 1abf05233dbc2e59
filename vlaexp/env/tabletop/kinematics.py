"""Kinematics of the embedded arm: a 7-DOF chain with the Franka Panda's link offsets and joint limits.

Forward kinematics and the geometric Jacobian follow the modified Denavit-Hartenberg table that Franka publishes
(Craig's convention). Inverse kinematics is damped least squares (Wampler 1986; Nakamura and Hanafusa 1986) with the
damping raised near singular poses, joint limits by clamping, and a nullspace pull towards the home pose.
Lengths in m, angles in rad, rotations as 3x3 matrices in the world frame.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.spatial.transform import Rotation

NUM_JOINTS = 7
DH_A = np.array([0.0, 0.0, 0.0, 0.0825, -0.0825, 0.0, 0.088])
DH_D = np.array([0.333, 0.0, 0.316, 0.0, 0.384, 0.0, 0.0])
DH_ALPHA = np.array([0.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0]) * np.pi / 2
FLANGE_OFFSET = 0.107  # joint 7 to flange, along z
HAND_YAW = -np.pi / 4  # the hand is mounted turned against the flange
TCP_OFFSET = 0.1034  # flange to the point between the fingertips

JOINT_LOWER = np.array([-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973])
JOINT_UPPER = np.array([2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973])
JOINT_VELOCITY = np.array([2.175, 2.175, 2.175, 2.175, 2.61, 2.61, 2.61])  # rad/s
HOME = np.array([0.0, -0.2, 0.0, -2.2, 0.0, 2.0, 0.7853])  # tool points down at about (0.49, 0, 0.36)

POSITION_TOLERANCE = 5e-3  # m; a larger remaining error counts as unreachable
ROTATION_TOLERANCE = 5e-2  # rad


def _fixed_transforms() -> np.ndarray:
    """(7, 4, 4): RotX(alpha) TransX(a), the part of each link transform that does not move."""
    cos, sin = np.cos(DH_ALPHA), np.sin(DH_ALPHA)
    fixed = np.zeros((NUM_JOINTS, 4, 4))
    fixed[:, 0, 0], fixed[:, 0, 3] = 1.0, DH_A
    fixed[:, 1, 1], fixed[:, 1, 2] = cos, -sin
    fixed[:, 2, 1], fixed[:, 2, 2] = sin, cos
    fixed[:, 3, 3] = 1.0
    return fixed


_FIXED = _fixed_transforms()
_TOOL = np.eye(4)
_TOOL[:3, :3] = Rotation.from_euler("z", HAND_YAW).as_matrix()
_TOOL[2, 3] = FLANGE_OFFSET + TCP_OFFSET


def joint_frames(q: Float[np.ndarray, "*batch 7"]) -> Float[np.ndarray, "7 *batch 4 4"]:
    """World poses of the seven joint frames, each after its own rotation."""
    cos, sin = np.cos(q), np.sin(q)
    moving = np.zeros((*q.shape, 4, 4))
    moving[..., 0, 0] = moving[..., 1, 1] = cos
    moving[..., 1, 0], moving[..., 0, 1] = sin, -sin
    moving[..., 2, 2] = moving[..., 3, 3] = 1.0
    moving[..., 2, 3] = DH_D
    links = _FIXED @ moving
    frames = [links[..., 0, :, :]]
    for i in range(1, NUM_JOINTS):
        frames.append(frames[-1] @ links[..., i, :, :])
    return np.stack(frames)


def forward_kinematics(
    q: Float[np.ndarray, "*batch 7"],
) -> tuple[Float[np.ndarray, "*batch 3"], Float[np.ndarray, "*batch 3 3"]]:
    """Tool-centre position (m) and rotation in the world frame for joint angles q (rad)."""
    tool = joint_frames(q)[-1] @ _TOOL
    return tool[..., :3, 3], tool[..., :3, :3]


def jacobian(q: Float[np.ndarray, "7"]) -> tuple[np.ndarray, np.ndarray, Float[np.ndarray, "6 7"]]:
    """Tool-centre position, rotation and geometric Jacobian (rows: linear m/rad, angular rad/rad)."""
    frames = joint_frames(q)
    tool = frames[-1] @ _TOOL
    axes, origins = frames[:, :3, 2], frames[:, :3, 3]
    arms = tool[:3, 3] - origins
    linear = axes[:, [1, 2, 0]] * arms[:, [2, 0, 1]] - axes[:, [2, 0, 1]] * arms[:, [1, 2, 0]]
    jac = np.concatenate([linear, axes], axis=1).T
    return tool[:3, 3], tool[:3, :3], jac


def rotation_vector(matrix: Float[np.ndarray, "*batch 3 3"]) -> Float[np.ndarray, "*batch 3"]:
    """Logarithm of a rotation: axis times angle (rad), angle in [0, pi]."""
    # SciPy's checked constructor is 8 times slower on one matrix, and this runs in every iteration of the IK.
    skew = 0.5 * np.stack(
        [
            matrix[..., 2, 1] - matrix[..., 1, 2],
            matrix[..., 0, 2] - matrix[..., 2, 0],
            matrix[..., 1, 0] - matrix[..., 0, 1],
        ],
        axis=-1,
    )
    sine = np.sqrt((skew**2).sum(-1))
    angle = np.arctan2(sine, 0.5 * (np.trace(matrix, axis1=-2, axis2=-1) - 1.0))
    if np.any(angle > 3.0):  # the skew part vanishes at a half turn
        return Rotation.from_matrix(matrix.reshape(-1, 3, 3)).as_rotvec().reshape(skew.shape)
    return skew * np.where(sine < 1e-8, 1.0, angle / np.maximum(sine, 1e-8))[..., None]


def rotation_matrix(vector: Float[np.ndarray, "*batch 3"]) -> Float[np.ndarray, "*batch 3 3"]:
    """Exponential of a rotation vector (rad); inverse of `rotation_vector`."""
    return Rotation.from_rotvec(vector.reshape(-1, 3)).as_matrix().reshape(*vector.shape[:-1], 3, 3)


@dataclass(frozen=True)
class IKSolution:
    """Joint angles nearest to the wanted pose, the pose they give, and whether that is the wanted one."""

    q: np.ndarray
    position: np.ndarray
    rotation: np.ndarray
    reached: bool


def inverse_kinematics(
    position: Float[np.ndarray, "3"],
    rotation: Float[np.ndarray, "3 3"],
    start: Float[np.ndarray, "7"],
    lower: Float[np.ndarray, "7"] = JOINT_LOWER,
    upper: Float[np.ndarray, "7"] = JOINT_UPPER,
    iterations: int = 20,
) -> IKSolution:
    """Damped least squares from `start`, inside [lower, upper]; returns the best pose met when the goal is not reached.

    The damping grows as the manipulability sqrt(det(J J^T)) falls under 0.02 (Nakamura and Hanafusa 1986), so a
    singular pose slows the arm instead of throwing it.
    """
    q = np.clip(start, lower, upper)
    best_q, best_cost = q, np.inf
    for _ in range(iterations):
        p, r, jac = jacobian(q)
        error = np.concatenate([position - p, rotation_vector(rotation @ r.T)])
        cost = float(np.linalg.norm(error[:3]) + 0.1 * np.linalg.norm(error[3:]))
        if cost < best_cost:
            best_q, best_cost = q, cost
        if np.linalg.norm(error[:3]) < 1e-4 and np.linalg.norm(error[3:]) < 1e-3:
            break
        gram = jac @ jac.T
        manipulability = np.sqrt(max(np.linalg.det(gram), 0.0))
        damping = 1e-4 + 0.05 * max(0.0, 1.0 - manipulability / 0.02) ** 2
        pseudo_inverse = jac.T @ np.linalg.inv(gram + damping * np.eye(6))
        nullspace_pull = (np.eye(NUM_JOINTS) - pseudo_inverse @ jac) @ (0.1 * (HOME - q))
        step = np.clip(pseudo_inverse @ error + nullspace_pull, -0.3, 0.3)
        q = np.clip(q + step, lower, upper)
    p, r = forward_kinematics(best_q)
    reached = (
        float(np.linalg.norm(position - p)) < POSITION_TOLERANCE
        and float(np.linalg.norm(rotation_vector(rotation @ r.T))) < ROTATION_TOLERANCE
    )
    return IKSolution(best_q, p, r, reached)
