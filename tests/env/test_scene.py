"""Laws of the scene distribution: a seed decides everything, words name one thing, and what is held out stays out."""

import json
from collections.abc import Callable

import numpy as np
import pytest
import yaml

from vlaexp.config import config_dir
from vlaexp.env.tabletop.env import DEFAULT_CAMERA, TabletopEnv
from vlaexp.env.tabletop.kinematics import JOINT_LOWER, JOINT_UPPER
from vlaexp.env.tabletop.scene import (
    COLOURS,
    FAMILIES,
    MAX_OBJECTS,
    PUSH_SIDES,
    RECEPTACLE_PHRASE,
    RECEPTACLES,
    SHAPES,
    ObjectPool,
    Scene,
    SceneSampler,
)
from vlaexp.errors import UserError

SEEDS = range(300)
TRAINED = yaml.safe_load((config_dir() / "env" / "tabletop.yaml").read_text())
UNSEEN = {
    name: split["env"]["target_pool"]
    for file in ("unseen_object", "unseen_colour")
    for name, split in yaml.safe_load((config_dir() / "eval" / f"{file}.yaml").read_text())["splits"].items()
}


def pool(settings: dict[str, object]) -> ObjectPool:
    return ObjectPool(**{key: value for key, value in settings.items() if key != "_target_"})


def scenes(seeds: range = SEEDS, **changes: object) -> list[Scene]:
    """Scenes of conf/env/tabletop.yaml, with changes."""
    names = ("families", "target_pool", "num_objects", "scale", "camera_jitter")
    settings = {name: TRAINED[name] for name in names} | {"pool": pool(TRAINED["pool"]), "front_camera": DEFAULT_CAMERA}
    sampler = SceneSampler(**{**settings, **changes})
    return [sampler.sample(seed) for seed in seeds]


@pytest.fixture(scope="module")
def env(make_env: Callable[..., TabletopEnv]) -> TabletopEnv:
    return make_env()


def test_a_scene_is_a_pure_function_of_its_seed(env: TabletopEnv) -> None:
    forwards = scenes()
    np.random.seed(7)
    assert [scenes(range(seed, seed + 1))[0] for seed in reversed(range(20))] == forwards[:20][::-1]
    for seed in (3, 1, 3):
        env.reset(seed)
        assert env.scene == forwards[seed]
    assert len({scene.objects for scene in forwards}) == len(forwards)


def test_a_scene_survives_json(env: TabletopEnv) -> None:
    for seed in range(60):
        env.reset(seed)
        assert Scene.from_dict(json.loads(json.dumps(env.describe()))) == env.scene


def test_reset_to_a_written_scene_is_reset(env: TabletopEnv) -> None:
    env.reset(11)
    state, description = env.world.data.qpos.copy(), env.describe()
    env.reset(12)
    env.reset_to(Scene.from_dict(json.loads(json.dumps(description))))
    np.testing.assert_array_equal(env.world.data.qpos, state)


def test_the_instruction_names_exactly_the_target() -> None:
    for scene in scenes():
        named = [slot for slot, item in enumerate(scene.objects) if item.name in scene.instruction]
        assert named == [scene.target]
        assert len({item.colour for item in scene.objects}) == len(scene.objects)
        for side in PUSH_SIDES:
            assert (f" {side} side" in scene.instruction) == (scene.side == side)
        for receptacle in RECEPTACLES:
            assert (RECEPTACLE_PHRASE[receptacle] in scene.instruction) == (scene.receptacle == receptacle)


def test_each_family_asks_for_what_it_needs() -> None:
    seen = scenes()
    assert {scene.family for scene in seen} == set(FAMILIES)
    for scene in seen:
        assert (scene.side is not None) == (scene.family == "push")
        assert (scene.receptacle is not None) == (scene.family == "place")
        assert set(scene.receptacle_positions) == (set(RECEPTACLES) if scene.family == "place" else set())
    assert {scene.side for scene in seen} == {None, *PUSH_SIDES}
    assert {scene.receptacle for scene in seen} == {None, *RECEPTACLES}


def test_objects_start_apart_and_the_arm_within_its_limits() -> None:
    low, high = TRAINED["scale"]
    for scene in scenes():
        places = np.array([(item.x, item.y) for item in scene.objects])
        gaps = np.linalg.norm(places[:, None] - places[None], axis=-1)[~np.eye(len(places), dtype=bool)]
        assert gaps.min() >= 0.11
        assert all(low <= item.scale <= high for item in scene.objects)
        assert TRAINED["num_objects"][0] <= len(scene.objects) <= TRAINED["num_objects"][1]
        assert np.all(scene.start_q >= JOINT_LOWER)
        assert np.all(scene.start_q <= JOINT_UPPER)


def test_the_slot_of_the_target_tells_nothing() -> None:
    full = [scene.target for scene in scenes(range(1500)) if len(scene.objects) == MAX_OBJECTS]
    counts = np.bincount(full, minlength=MAX_OBJECTS)
    expected = len(full) / MAX_OBJECTS
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi squared with 3 degrees of freedom, p = 0.001


def test_excluded_combinations_never_appear() -> None:
    left_out = {tuple(pair) for pair in TRAINED["pool"]["exclude"]}
    assert left_out
    kinds = {(item.colour, item.shape) for scene in scenes() for item in scene.objects}
    assert not kinds & left_out
    assert kinds == {(c, s) for c in TRAINED["pool"]["colours"] for s in TRAINED["pool"]["shapes"]} - left_out


@pytest.mark.parametrize("split", UNSEEN)
def test_unseen_targets_are_never_in_the_training_world(split: str) -> None:
    trained, unseen = pool(TRAINED["pool"]), pool(UNSEEN[split])
    assert not set(unseen.kinds) & set(trained.kinds)
    targets = set()
    for scene in scenes(target_pool=unseen):
        kinds = [(item.colour, item.shape) for item in scene.objects]
        targets.add(kinds[scene.target])
        assert set(kinds[: scene.target] + kinds[scene.target + 1 :]) <= set(trained.kinds)
    assert targets == set(unseen.kinds)


def test_camera_shift_moves_the_front_camera_alone(make_env: Callable[..., TabletopEnv]) -> None:
    shift = np.array([0.0, 0.10, -0.05])
    nominal, shifted = make_env("pick"), make_env("pick", camera_shift=shift.tolist())
    for seed in range(5):
        nominal.reset(seed)
        shifted.reset(seed)
        one, two = nominal.scene, shifted.scene
        assert one.objects == two.objects
        assert one.instruction == two.instruction
        assert one.start_q == two.start_q
        np.testing.assert_allclose(np.subtract(two.front_camera.position, one.front_camera.position), shift)
        assert two.front_camera.target == one.front_camera.target
        for env in (nominal, shifted):
            model, pose = env.world.model, env.scene.front_camera
            np.testing.assert_allclose(model.camera("front").pos, pose.position)
            looks = -env.world.data.cam_xmat[model.camera("front").id].reshape(3, 3)[:, 2]
            np.testing.assert_allclose(
                looks, np.subtract(pose.target, pose.position) / np.linalg.norm(np.subtract(pose.target, pose.position))
            )
        first, second = nominal.observe(), shifted.observe()
        assert np.any(first.images["front"] != second.images["front"])
        np.testing.assert_array_equal(first.images["wrist"], second.images["wrist"])
        np.testing.assert_array_equal(first.state, second.state)
    nominal.close()
    shifted.close()


def test_camera_jitter_stays_within_its_half_width() -> None:
    offsets = np.array(
        [
            np.subtract(two.front_camera.position, one.front_camera.position)
            for one, two in zip(scenes(camera_jitter=0.0), scenes(camera_jitter=0.02), strict=True)
        ]
    )
    assert np.abs(offsets).max() <= 0.02 + 1e-12
    assert offsets.std() > 0.005


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"colours": ["redd"], "shapes": ["cube"]}, "unknown colour 'redd'; .*nearest: red"),
        ({"colours": ["red"], "shapes": ["cubes"]}, "unknown shape 'cubes'; .*nearest: cube"),
        ({"colours": ["red"], "shapes": ["cube"], "exclude": [["red", "cube"]]}, "the object pool is empty"),
    ],
)
def test_a_wrong_pool_says_what_is_wrong(settings: dict[str, object], text: str) -> None:
    with pytest.raises(UserError, match=text):
        ObjectPool(**settings)


def test_a_wrong_world_says_what_is_wrong(make_env: Callable[..., TabletopEnv]) -> None:
    # hydra wraps what a constructor raises; the text is the user's.
    with pytest.raises(Exception, match=r"unknown task family 'pickk'; .*nearest: pick"):
        make_env("pickk")
    with pytest.raises(Exception, match=r"num_objects is \[2, 9\]; expected \[low, high\] within 1..4"):
        make_env(num_objects=[2, 9])
    with pytest.raises(UserError, match="call reset"):
        make_env().observe()
    few = make_env(pool=ObjectPool(list(COLOURS)[:1], list(SHAPES)))
    with pytest.raises(UserError, match="give it at least as many colours"):
        few.reset(0)
