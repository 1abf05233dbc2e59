"""Action representations: how a chunk of labels is read from a dataset's columns, each transform beside its inverse.

`plain` takes a column as it is (absolute targets, or deltas against the previous command).
`chunk_start` expresses recorded absolute tool targets relative to the measured tool pose at the chunk's first step.
Poses are (x, y, z, first two columns of the rotation) in the world frame.
"""

import numpy as np
from jaxtyping import Float

from vlaexp.env.tabletop.kinematics import rotation_matrix, rotation_vector


def rotation_from_6d(columns: Float[np.ndarray, "*batch 6"]) -> Float[np.ndarray, "*batch 3 3"]:
    """Gram-Schmidt on two columns (Zhou et al. 2019, arXiv 1812.07035)."""
    first = columns[..., :3] / np.linalg.norm(columns[..., :3], axis=-1, keepdims=True)
    second = columns[..., 3:] - (first * columns[..., 3:]).sum(-1, keepdims=True) * first
    second = second / np.linalg.norm(second, axis=-1, keepdims=True)
    return np.stack([first, second, np.cross(first, second)], axis=-1)


def relative_to_start(
    target: Float[np.ndarray, "B H 9"], start: Float[np.ndarray, "B 9"]
) -> Float[np.ndarray, "B H 6"]:
    """Translation (m) and rotation vector (rad), both in the world frame, from the start pose to each target."""
    turn = rotation_from_6d(target[..., 3:]) @ np.swapaxes(rotation_from_6d(start[..., 3:]), -1, -2)[:, None]
    return np.concatenate([target[..., :3] - start[:, None, :3], rotation_vector(turn)], -1)


def apply_to_start(
    delta: Float[np.ndarray, "B H 6"], start: Float[np.ndarray, "B 9"]
) -> tuple[Float[np.ndarray, "B H 3"], Float[np.ndarray, "B H 3 3"]]:
    """Inverse of `relative_to_start`: positions and rotations of the targets."""
    return delta[..., :3] + start[:, None, :3], rotation_matrix(delta[..., 3:]) @ rotation_from_6d(start[..., 3:])[
        :, None
    ]


def accumulate(
    delta: Float[np.ndarray, "B H 6"], start: Float[np.ndarray, "B 9"]
) -> tuple[Float[np.ndarray, "B H 3"], Float[np.ndarray, "B H 3 3"]]:
    """Targets that deltas against the previous command lead to, when the command before the chunk was `start`."""
    rotation = rotation_from_6d(start[..., 3:])
    rotations = []
    for step in range(delta.shape[1]):
        rotation = rotation_matrix(delta[:, step, 3:]) @ rotation
        rotations.append(rotation)
    return np.cumsum(delta[..., :3], 1) + start[:, None, :3], np.stack(rotations, 1)
