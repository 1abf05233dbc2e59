"""What stands on the table: object kinds, task families, how a seed becomes a scene, and the words for it.

Distances in m, angles in rad, world frame: the robot's base is the origin, +x points away from it, +y to its left.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlaexp.env.tabletop.kinematics import HOME, JOINT_LOWER, JOINT_UPPER
from vlaexp.errors import UserError, nearest

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.10, 0.10),
    "green": (0.10, 0.65, 0.15),
    "blue": (0.10, 0.20, 0.85),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.55, 0.10, 0.65),
    "orange": (1.00, 0.50, 0.05),
    "cyan": (0.10, 0.80, 0.85),
    "pink": (1.00, 0.60, 0.75),
}

# MuJoCo geom of each shape and its size (half extents; radius, half height; radius) for an object of scale 1.
SHAPES: dict[str, tuple[str, tuple[float, float, float]]] = {
    "cube": ("box", (0.020, 0.020, 0.020)),
    "cylinder": ("cylinder", (0.021, 0.020, 0.0)),
    "bar": ("box", (0.044, 0.015, 0.020)),
    "post": ("box", (0.016, 0.016, 0.036)),
    "ball": ("sphere", (0.022, 0.0, 0.0)),
    "slab": ("box", (0.026, 0.026, 0.011)),
}
MAX_OBJECTS = 4

PUSH_SIDES: dict[str, tuple[float, float]] = {"left": (0.0, 1.0), "right": (0.0, -1.0), "far": (1.0, 0.0)}
PUSH_LINE = {"left": 0.20, "right": 0.20, "far": 0.66}  # distance along the side's direction that an object must pass
RECEPTACLES = ("box", "pad")
RECEPTACLE_HALF_SIZE = 0.065
BOX_WALL_HEIGHT = 0.03

FAMILIES = ("pick", "push", "place")
PHRASINGS: dict[str, tuple[str, ...]] = {
    "pick": (
        "pick up the {object}",
        "grab the {object}",
        "lift the {object}",
        "take the {object}",
    ),
    "push": (
        "push the {object} to the {side} side",
        "slide the {object} to the {side} side",
        "shove the {object} over to the {side} side",
    ),
    "place": (
        "put the {object} {receptacle}",
        "place the {object} {receptacle}",
        "drop the {object} {receptacle}",
    ),
}
RECEPTACLE_PHRASE = {"box": "in the box", "pad": "on the pad"}


@dataclass(frozen=True)
class TableObject:
    """One object: its kind and where it starts. `scale` multiplies the sizes in `SHAPES`."""

    colour: str
    shape: str
    scale: float
    x: float
    y: float
    yaw: float

    @property
    def half_height(self) -> float:
        kind, size = SHAPES[self.shape]
        return self.scale * {"box": size[2], "cylinder": size[1], "sphere": size[0]}[kind]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class CameraPose:
    """A camera at `position` that looks at `target`, both in m."""

    position: tuple[float, float, float]
    target: tuple[float, float, float]


@dataclass(frozen=True)
class Scene:
    """Everything that a seed decides about an episode."""

    family: str
    instruction: str
    objects: tuple[TableObject, ...]
    target: int
    side: str | None
    receptacle: str | None
    receptacle_positions: dict[str, tuple[float, float]]
    start_q: tuple[float, ...]
    front_camera: CameraPose

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Scene":
        camera = data["front_camera"]
        return cls(
            family=data["family"],
            instruction=data["instruction"],
            objects=tuple(TableObject(**item) for item in data["objects"]),
            target=data["target"],
            side=data["side"],
            receptacle=data["receptacle"],
            receptacle_positions={key: tuple(value) for key, value in data["receptacle_positions"].items()},
            start_q=tuple(data["start_q"]),
            front_camera=CameraPose(tuple(camera["position"]), tuple(camera["target"])),
        )


class ObjectPool:
    """The object kinds that a world draws from.

    Args:
        colours, shapes: names from `COLOURS` and `SHAPES`.
        exclude: (colour, shape) pairs left out, for instance to test on them later.
        only: (colour, shape) pairs; when given, nothing else is in the pool.
    """

    def __init__(
        self,
        colours: Sequence[str],
        shapes: Sequence[str],
        exclude: Sequence[Sequence[str]] = (),
        only: Sequence[Sequence[str]] | None = None,
    ) -> None:
        pairs = [(pair[0], pair[1]) for pair in (*exclude, *(only or ()))]
        for name in (*colours, *(pair[0] for pair in pairs)):
            if name not in COLOURS:
                raise UserError(f"unknown colour {name!r}; {nearest(name, COLOURS)}")
        for name in (*shapes, *(pair[1] for pair in pairs)):
            if name not in SHAPES:
                raise UserError(f"unknown shape {name!r}; {nearest(name, SHAPES)}")
        left_out = {(pair[0], pair[1]) for pair in exclude}
        kinds = [(c, s) for c in colours for s in shapes] if only is None else [(p[0], p[1]) for p in only]
        self.kinds = [kind for kind in kinds if kind not in left_out]
        if not self.kinds:
            raise UserError("the object pool is empty; leave some (colour, shape) pair in it")

    def draw(self, rng: np.random.Generator, used_colours: set[str]) -> tuple[str, str]:
        """A kind whose colour is not yet on the table, so that the instruction names one object only."""
        kinds = [kind for kind in self.kinds if kind[0] not in used_colours]
        if not kinds:
            raise UserError(
                f"the object pool has no colour besides {sorted(used_colours)}; give it at least as many colours as "
                "objects in a scene"
            )
        return kinds[int(rng.integers(len(kinds)))]


class SceneSampler:
    """A distribution over scenes: `sample(seed)` is a pure function of the seed.

    Args:
        families: task families from `FAMILIES`, drawn uniformly.
        pool: where distractors (and, without `target_pool`, the target) come from.
        target_pool: where the named object comes from.
        num_objects: smallest and largest number of objects.
        scale: smallest and largest object scale.
        front_camera: mean pose of the front camera.
        camera_jitter: half width in m of a uniform shift of the camera position per episode.
    """

    def __init__(
        self,
        families: Sequence[str],
        pool: ObjectPool,
        target_pool: ObjectPool | None,
        num_objects: Sequence[int],
        scale: Sequence[float],
        front_camera: CameraPose,
        camera_jitter: float,
    ) -> None:
        for family in families:
            if family not in FAMILIES:
                raise UserError(f"unknown task family {family!r}; {nearest(family, FAMILIES)}")
        if not 1 <= num_objects[0] <= num_objects[1] <= MAX_OBJECTS:
            raise UserError(f"num_objects is {list(num_objects)}; expected [low, high] within 1..{MAX_OBJECTS}")
        self.families = tuple(families)
        self.pool = pool
        self.target_pool = target_pool or pool
        self.num_objects = (int(num_objects[0]), int(num_objects[1]))
        self.scale = (float(scale[0]), float(scale[1]))
        self.front_camera = front_camera
        self.camera_jitter = camera_jitter

    def sample(self, seed: int) -> Scene:
        rng = np.random.default_rng(seed)
        family = self.families[int(rng.integers(len(self.families)))]
        kinds = self._draw_kinds(rng)
        target = int(rng.integers(len(kinds)))
        kinds[0], kinds[target] = kinds[target], kinds[0]  # the target was drawn first; its place must not tell
        scales = rng.uniform(*self.scale, len(kinds))
        side = str(rng.choice(list(PUSH_SIDES))) if family == "push" else None
        receptacle = str(rng.choice(RECEPTACLES)) if family == "place" else None
        receptacle_positions = _draw_receptacles(rng) if family == "place" else {}
        positions = self._draw_positions(rng, len(kinds), target, side)
        objects = tuple(
            TableObject(colour, shape, float(s), float(x), float(y), float(rng.uniform(-0.5, 0.5)))
            for (colour, shape), s, (x, y) in zip(kinds, scales, positions, strict=True)
        )
        phrasing = PHRASINGS[family][int(rng.integers(len(PHRASINGS[family])))]
        instruction = phrasing.format(
            object=objects[target].name, side=side, receptacle=RECEPTACLE_PHRASE.get(receptacle or "")
        )
        start_q = HOME + rng.uniform(-1, 1, 7) * np.array([0.35, 0.12, 0.10, 0.12, 0.10, 0.10, 0.20])
        shift = rng.uniform(-1, 1, 3) * self.camera_jitter
        position = tuple(float(v) for v in np.asarray(self.front_camera.position) + shift)
        return Scene(
            family=family,
            instruction=instruction,
            objects=objects,
            target=target,
            side=side,
            receptacle=receptacle,
            receptacle_positions=receptacle_positions,
            start_q=tuple(float(v) for v in np.clip(start_q, JOINT_LOWER, JOINT_UPPER)),
            front_camera=CameraPose((position[0], position[1], position[2]), self.front_camera.target),
        )

    def _draw_kinds(self, rng: np.random.Generator) -> list[tuple[str, str]]:
        count = int(rng.integers(self.num_objects[0], self.num_objects[1] + 1))
        kinds = [self.target_pool.draw(rng, set())]
        while len(kinds) < count:
            kinds.append(self.pool.draw(rng, {colour for colour, _ in kinds}))
        return kinds

    @staticmethod
    def _draw_positions(rng: np.random.Generator, count: int, target: int, side: str | None) -> np.ndarray:
        """Positions (count, 2) at least 11 cm apart, leaving free the corridor that a push sweeps."""
        low, high = ((0.38, -0.15), (0.56, 0.15)) if side is not None else ((0.36, -0.17), (0.58, 0.17))
        while True:
            positions = rng.uniform(low, high, (count, 2))
            gaps = np.linalg.norm(positions[:, None] - positions[None], axis=-1) + np.eye(count)
            if gaps.min() < 0.11:
                continue
            if side is None or _corridor_is_free(positions, target, np.array(PUSH_SIDES[side])):
                return positions


def _corridor_is_free(positions: np.ndarray, target: int, direction: np.ndarray) -> bool:
    """No other object within 9 cm of the line along which the target is pushed, nor where the pusher starts."""
    relative = np.delete(positions, target, axis=0) - positions[target]
    along = relative @ direction
    across = np.abs(relative @ np.array([-direction[1], direction[0]]))
    return not bool(np.any((along > -0.13) & (across < 0.09)))


def _draw_receptacles(rng: np.random.Generator) -> dict[str, tuple[float, float]]:
    sides = rng.permutation([-1.0, 1.0])
    return {
        name: (float(rng.uniform(0.40, 0.54)), float(side * rng.uniform(0.255, 0.285)))
        for name, side in zip(RECEPTACLES, sides, strict=True)
    }
