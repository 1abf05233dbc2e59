"""A scripted expert for each task family, and the same expert spoilt in known ways.

The expert reads the true object poses and emits `ee_delta` actions against the previous command: a list of waypoints
per family, approached at a capped speed. `defect` makes it fail, or succeed badly, the way human demonstrations do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from vlaexp.env.tabletop import kinematics as kin
from vlaexp.env.tabletop.env import TabletopEnv
from vlaexp.env.tabletop.scene import BOX_WALL_HEIGHT, PUSH_LINE, PUSH_SIDES, SHAPES
from vlaexp.errors import UserError, nearest

Defect = Literal["wrong_object", "early_close", "grasp_offset", "jerky", "idle", "truncated", "dropped_frames"]
DEFECTS: tuple[str, ...] = get_args(Defect)

SPEED = 0.045  # m per control step
TURN_SPEED = 0.15  # rad per control step
TOOL_DOWN = np.diag([1.0, -1.0, -1.0])
HOVER = 0.11  # m above an object before descending on it
JERK_NOISE = 0.012  # m, standard deviation


@dataclass
class Waypoint:
    """Go to `pose()` with the gripper as given, then hold for `dwell` steps."""

    pose: Callable[[], tuple[np.ndarray, np.ndarray]]
    gripper: float
    slow: float = 1.0
    dwell: int = 0
    free: bool = True  # far from contact: DART noise may be added here


class Expert:
    """Waypoint follower for the episode that `env` was just reset to.

    Args:
        env: the environment, after `reset`.
        rng: randomness of the jerky defect.
        defect: one of `DEFECTS`, or None for a good demonstration. `truncated` and `dropped_frames` concern the
            recorder, not the motion.
    """

    def __init__(self, env: TabletopEnv, rng: np.random.Generator, defect: str | None = None) -> None:
        if defect is not None and defect not in DEFECTS:
            raise UserError(f"unknown defect {defect!r}; {nearest(defect, DEFECTS)}")
        self._env, self._rng, self._defect = env, rng, defect
        scene = env.scene
        self._slot = scene.target
        if defect == "wrong_object":
            self._slot = (scene.target + 1) % len(scene.objects)
        self._item = scene.objects[self._slot]
        self._offset = np.array([0.03, 0.03, 0.0]) if defect == "grasp_offset" else np.zeros(3)
        self._waypoints = {"pick": self._pick, "push": self._push, "place": self._place}[scene.family]()
        self._index, self._dwelt, self._idle = 0, 0, 0

    @property
    def in_free_space(self) -> bool:
        return self._waypoints[self._index].free

    def act(self) -> np.ndarray:
        """The next `ee_delta` action (7,) against the previous command."""
        waypoint = self._waypoints[self._index]
        command = self._env.command
        position, rotation = waypoint.pose()
        if self._defect == "idle" and self._index == 1 and self._idle < 12:
            self._idle += 1
            return np.concatenate([np.zeros(6), [waypoint.gripper]])
        error = position - command.position
        turn = kin.rotation_vector(rotation @ command.rotation.T)
        step = _limit(error, SPEED * waypoint.slow)
        turn_step = _limit(turn, TURN_SPEED)
        arrived = np.linalg.norm(error - step) < 2e-3 and np.linalg.norm(turn - turn_step) < 1e-2
        if arrived and self._dwelt < waypoint.dwell:
            self._dwelt += 1
        elif arrived and self._index + 1 < len(self._waypoints):
            self._index, self._dwelt = self._index + 1, 0
        if self._defect == "jerky":
            step = step + self._rng.normal(0, JERK_NOISE, 3)
        gripper = waypoint.gripper
        if self._defect == "early_close" and self._index >= 1:
            gripper = 0.0
        return np.concatenate([step, turn_step, [gripper]])

    def _at(self, offset: np.ndarray, rotation: np.ndarray) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
        start, _ = self._env.world.object_pose(self._slot)
        return lambda: (start + self._offset + offset, rotation)

    def _grasp(self) -> tuple[list[Waypoint], np.ndarray, np.ndarray]:
        """Waypoints up to the closed gripper; also the tool rotation and the tool's offset from the object's centre."""
        item = self._item
        _, object_rotation = self._env.world.object_pose(self._slot)
        yaw = np.arctan2(object_rotation[1, 0], object_rotation[0, 0])
        if item.shape in ("cylinder", "ball"):
            yaw = 0.0
        elif item.shape == "bar":  # fingers across its narrow side
            yaw = (yaw + np.pi / 2) % np.pi - np.pi / 2
        else:
            yaw = (yaw + np.pi / 4) % (np.pi / 2) - np.pi / 4
        rotation = kin.rotation_matrix(np.array([0, 0, yaw])) @ TOOL_DOWN
        # As deep as the table allows, but never with the palm on top of a tall object.
        depth = max(-0.005, item.half_height - 0.035, 0.012 - item.half_height)
        at_object = np.array([0, 0, depth])
        waypoints = [
            Waypoint(self._at(np.array([0, 0, HOVER]), rotation), gripper=1.0),
            Waypoint(self._at(at_object, rotation), gripper=1.0, slow=0.7),
            Waypoint(self._at(at_object, rotation), gripper=0.0, dwell=2, free=False),
        ]
        return waypoints, rotation, at_object

    def _pick(self) -> list[Waypoint]:
        waypoints, rotation, at_object = self._grasp()
        lift = at_object + np.array([0, 0, 0.14])
        return [*waypoints, Waypoint(self._at(lift, rotation), gripper=0.0, dwell=99, free=False)]

    def _place(self) -> list[Waypoint]:
        scene = self._env.scene
        waypoints, rotation, at_object = self._grasp()
        assert scene.receptacle is not None
        goal = np.array([*scene.receptacle_positions[scene.receptacle], 0.0])
        clearance = BOX_WALL_HEIGHT if scene.receptacle == "box" else 0.0
        carry = goal + np.array([0, 0, self._item.half_height + 0.07 + clearance]) + at_object
        release = goal + np.array([0, 0, self._item.half_height + 0.012]) + at_object
        retreat = release + np.array([0, 0, 0.10])
        lift = at_object + np.array([0, 0, 0.08 + clearance])
        return [
            *waypoints,
            Waypoint(self._at(lift, rotation), gripper=0.0, free=False),
            Waypoint(lambda: (carry, rotation), gripper=0.0, free=False),
            Waypoint(lambda: (release, rotation), gripper=0.0, slow=0.7, free=False),
            Waypoint(lambda: (release, rotation), gripper=1.0, dwell=1, free=False),
            Waypoint(lambda: (retreat, rotation), gripper=1.0, dwell=99, free=False),
        ]

    def _push(self) -> list[Waypoint]:
        scene, item = self._env.scene, self._item
        assert scene.side is not None
        direction = np.array([*PUSH_SIDES[scene.side], 0.0])
        across = np.array([-direction[1], direction[0], 0.0])
        # The fingers' broad face (along the hand's y axis) pushes.
        yaw = np.arctan2(direction[1], direction[0])
        yaw = (yaw + np.pi / 2) % np.pi - np.pi / 2
        rotation = kin.rotation_matrix(np.array([0, 0, yaw])) @ TOOL_DOWN
        reach = item.scale * max(SHAPES[item.shape][1][:2])
        behind = -(reach + 0.035) * direction + self._offset
        start, _ = self._env.world.object_pose(self._slot)
        low = np.array([start[0], start[1], 0.022])
        end_distance = PUSH_LINE[scene.side] + 0.03 - reach

        def follow() -> tuple[np.ndarray, np.ndarray]:
            """Past the line, steered so that the pusher stays behind the object's centre."""
            position, _ = self._env.world.object_pose(self._slot)
            return end_distance * direction + (position @ across) * across + np.array([0, 0, 0.022]), rotation

        return [
            Waypoint(lambda: (low + behind + np.array([0, 0, 0.10]), rotation), gripper=1.0),
            Waypoint(lambda: (low + behind, rotation), gripper=0.0, slow=0.7),
            Waypoint(follow, gripper=0.0, slow=0.6, dwell=99, free=False),
        ]


def _limit(vector: np.ndarray, longest: float) -> np.ndarray:
    norm = float(np.linalg.norm(vector))
    return vector if norm <= longest else vector * (longest / norm)
