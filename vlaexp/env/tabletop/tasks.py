"""When an episode is a success: a test on the physical state, one per task family.

pick: the named object is at least 8 cm above where it rested and within 5 cm of the tool centre (lifted, not flung).
push: the centre of the named object is past the line of the named side, on the table, and was never lifted there.
place: the named object lies inside the named receptacle, released by the fingers and nearly still.
"""

import numpy as np

from vlaexp.env.tabletop.scene import BOX_WALL_HEIGHT, PUSH_LINE, PUSH_SIDES, RECEPTACLE_HALF_SIZE, Scene
from vlaexp.env.tabletop.world import World

LIFT_HEIGHT = 0.08
MAX_STEPS = {"pick": 45, "push": 60, "place": 75}  # about 1.7 times the expert's mean length


def is_success(scene: Scene, world: World, slot: int | None = None) -> bool:
    """Whether the task of `scene` is done in `world`, judged for object `slot` (default: the named one)."""
    slot = scene.target if slot is None else slot
    item = scene.objects[slot]
    position, _ = world.object_pose(slot)
    height = position[2] - item.half_height
    if scene.family == "pick":
        tcp, _ = world.tcp
        return bool(height > LIFT_HEIGHT and np.linalg.norm(position - tcp) < 0.05)
    if scene.family == "push":
        assert scene.side is not None
        progress = float(position[:2] @ np.array(PUSH_SIDES[scene.side]))
        return bool(progress > PUSH_LINE[scene.side] and height < 0.03)
    assert scene.receptacle is not None
    inside = np.abs(position[:2] - np.array(scene.receptacle_positions[scene.receptacle])) < RECEPTACLE_HALF_SIZE
    return bool(
        inside.all()
        and height < BOX_WALL_HEIGHT
        and slot not in world.held_objects()
        and world.object_speed(slot) < 0.05
    )
