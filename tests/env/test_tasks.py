"""Success is a state of the world: every predicate on states set by hand, just inside and just outside."""

from collections.abc import Callable

import numpy as np
import pytest

from vlaexp.env.tabletop import kinematics as kin
from vlaexp.env.tabletop.env import DEFAULT_CAMERA, TabletopEnv
from vlaexp.env.tabletop.scene import (
    BOX_WALL_HEIGHT,
    PUSH_LINE,
    PUSH_SIDES,
    RECEPTACLE_HALF_SIZE,
    RECEPTACLES,
    Scene,
    TableObject,
)
from vlaexp.env.tabletop.tasks import LIFT_HEIGHT, MAX_STEPS, is_success
from vlaexp.env.tabletop.world import FINGER_TRAVEL

import mujoco  # isort: skip

TARGET, OTHER = 0, 1
OBJECTS = (TableObject("red", "cube", 1.0, 0.42, 0.05, 0.0), TableObject("blue", "cube", 1.0, 0.50, -0.08, 0.0))
HALF_HEIGHT = OBJECTS[TARGET].half_height
PLACES = {"box": (0.45, 0.27), "pad": (0.48, -0.27)}
FAR_AWAY = (0.42, 0.05, HALF_HEIGHT)

Put = Callable[..., None]


@pytest.fixture(scope="module")
def env(make_env: Callable[..., TabletopEnv]) -> TabletopEnv:
    return make_env()


def start(env: TabletopEnv, family: str, side: str | None = None, receptacle: str | None = None) -> Scene:
    """The same two cubes for every task; the arm waits at home."""
    places = PLACES if family == "place" else {}
    scene = Scene(family, "", OBJECTS, TARGET, side, receptacle, places, tuple(kin.HOME), DEFAULT_CAMERA)
    env.reset_to(scene)
    assert not is_success(scene, env.world)
    return scene


def put_tool(env: TabletopEnv, position: np.ndarray, opening: float) -> None:
    """Sets the arm by hand: tool pointing down at `position`, fingers `opening` m from the middle."""
    solution = kin.inverse_kinematics(position, np.diag([1.0, -1.0, -1.0]), kin.HOME, iterations=100)
    assert solution.reached
    data = env.world.data
    data.qpos[:7] = solution.q
    data.qpos[7:9] = opening
    mujoco.mj_forward(env.world.model, data)


def test_every_family_has_a_time_limit() -> None:
    assert set(MAX_STEPS) == {"pick", "push", "place"}


# pick


def test_an_object_lifted_in_the_tool_is_picked(env: TabletopEnv, put_object: Put) -> None:
    scene = start(env, "pick")
    tool = env.world.tcp[0]
    assert tool[2] > LIFT_HEIGHT + HALF_HEIGHT
    put_object(env, TARGET, tool)
    assert is_success(scene, env.world)


def test_an_object_lifted_too_little_is_not_picked(env: TabletopEnv, put_object: Put) -> None:
    scene = start(env, "pick")
    for height, picked in ((LIFT_HEIGHT - 0.002, False), (LIFT_HEIGHT + 0.002, True)):
        position = np.array([0.45, 0.0, height + HALF_HEIGHT])
        put_tool(env, position, FINGER_TRAVEL)
        put_object(env, TARGET, position)
        assert is_success(scene, env.world) is picked


@pytest.mark.parametrize("distance", [0.051, 0.15])
def test_an_object_in_the_air_away_from_the_tool_is_not_picked(
    env: TabletopEnv, put_object: Put, distance: float
) -> None:
    scene = start(env, "pick")
    put_object(env, TARGET, env.world.tcp[0] + [0.0, distance, 0.0], velocity=(0.0, 1.0, 2.0))  # flung
    assert not is_success(scene, env.world)


def test_another_object_lifted_is_not_the_named_one(env: TabletopEnv, put_object: Put) -> None:
    scene = start(env, "pick")
    put_object(env, OTHER, env.world.tcp[0])
    assert not is_success(scene, env.world)
    assert is_success(scene, env.world, slot=OTHER)


def test_a_tool_at_the_object_on_the_table_has_not_picked_it(env: TabletopEnv) -> None:
    scene = start(env, "pick")
    put_tool(env, env.world.object_pose(TARGET)[0] + [0.0, 0.0, 0.01], FINGER_TRAVEL)
    assert not is_success(scene, env.world)


# push


def beyond(side: str, margin: float) -> np.ndarray:
    """A place on the table `margin` m past the line of a side."""
    direction = np.array([*PUSH_SIDES[side], 0.0])
    across = 0.48 * np.array([1.0, 0.0, 0.0]) if direction[0] == 0 else np.zeros(3)
    return (PUSH_LINE[side] + margin) * direction + across + [0.0, 0.0, HALF_HEIGHT]


@pytest.mark.parametrize("side", PUSH_SIDES)
def test_an_object_is_pushed_once_its_centre_is_past_the_line(env: TabletopEnv, put_object: Put, side: str) -> None:
    scene = start(env, "push", side=side)
    put_object(env, TARGET, beyond(side, -0.001))
    assert not is_success(scene, env.world)
    put_object(env, TARGET, beyond(side, 0.001))
    assert is_success(scene, env.world)


@pytest.mark.parametrize("side", PUSH_SIDES)
def test_past_the_line_of_another_side_does_not_count(env: TabletopEnv, put_object: Put, side: str) -> None:
    scene = start(env, "push", side=side)
    for wrong in set(PUSH_SIDES) - {side}:
        put_object(env, TARGET, beyond(wrong, 0.02))
        assert not is_success(scene, env.world), wrong


@pytest.mark.parametrize("side", PUSH_SIDES)
def test_another_object_past_the_line_does_not_count(env: TabletopEnv, put_object: Put, side: str) -> None:
    scene = start(env, "push", side=side)
    put_object(env, OTHER, beyond(side, 0.02))
    assert not is_success(scene, env.world)


@pytest.mark.parametrize("side", PUSH_SIDES)
def test_an_object_carried_over_the_line_is_not_pushed(env: TabletopEnv, put_object: Put, side: str) -> None:
    scene = start(env, "push", side=side)
    put_object(env, TARGET, beyond(side, 0.02) + np.array([0.0, 0.0, 0.05]))
    assert not is_success(scene, env.world)


# place


def resting_in(receptacle: str, offset: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> np.ndarray:
    return np.array([*PLACES[receptacle], 0.004 + HALF_HEIGHT]) + offset


@pytest.mark.parametrize("receptacle", RECEPTACLES)
def test_an_object_at_rest_in_the_named_receptacle_is_placed(
    env: TabletopEnv, put_object: Put, receptacle: str
) -> None:
    scene = start(env, "place", receptacle=receptacle)
    put_object(env, TARGET, resting_in(receptacle))
    assert is_success(scene, env.world)


@pytest.mark.parametrize("receptacle", RECEPTACLES)
def test_the_other_receptacle_and_the_other_object_do_not_count(
    env: TabletopEnv, put_object: Put, receptacle: str
) -> None:
    scene = start(env, "place", receptacle=receptacle)
    put_object(env, OTHER, resting_in(receptacle))
    assert not is_success(scene, env.world)
    put_object(env, OTHER, FAR_AWAY)
    put_object(env, TARGET, resting_in("pad" if receptacle == "box" else "box"))
    assert not is_success(scene, env.world)


@pytest.mark.parametrize("receptacle", RECEPTACLES)
def test_an_object_over_the_edge_is_outside(env: TabletopEnv, put_object: Put, receptacle: str) -> None:
    scene = start(env, "place", receptacle=receptacle)
    for axis in (0, 1):
        for distance, inside in ((RECEPTACLE_HALF_SIZE - 0.002, True), (RECEPTACLE_HALF_SIZE + 0.002, False)):
            put_object(env, TARGET, resting_in(receptacle, tuple(distance * np.eye(3)[axis])))
            assert is_success(scene, env.world) is inside


@pytest.mark.parametrize("receptacle", RECEPTACLES)
def test_an_object_above_the_receptacle_or_still_moving_is_not_placed(
    env: TabletopEnv, put_object: Put, receptacle: str
) -> None:
    scene = start(env, "place", receptacle=receptacle)
    put_object(env, TARGET, resting_in(receptacle, (0.0, 0.0, BOX_WALL_HEIGHT)))
    assert not is_success(scene, env.world)
    put_object(env, TARGET, resting_in(receptacle), velocity=(0.06, 0.0, 0.0))
    assert not is_success(scene, env.world)
    put_object(env, TARGET, resting_in(receptacle), velocity=(0.02, 0.0, 0.0))
    assert is_success(scene, env.world)


@pytest.mark.parametrize("receptacle", RECEPTACLES)
def test_an_object_in_place_but_still_held_is_not_placed(env: TabletopEnv, put_object: Put, receptacle: str) -> None:
    scene = start(env, "place", receptacle=receptacle)
    put_object(env, TARGET, resting_in(receptacle))
    above = resting_in(receptacle, (0.0, 0.0, 0.01))
    put_tool(env, above, OBJECTS[TARGET].scale * 0.02 - 0.0005)  # half a millimetre of squeeze
    assert env.world.held_objects() == {TARGET}
    assert not is_success(scene, env.world)
    put_tool(env, above, FINGER_TRAVEL)
    assert env.world.held_objects() == set()
    assert is_success(scene, env.world)
