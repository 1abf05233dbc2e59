"""The Gymnasium face of the world, and the ways rendering can end: cleanly, or with a sentence that helps."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

from vlaexp.env.tabletop.env import EE_DELTA_SPEC, JOINT_SPEC, TabletopEnv
from vlaexp.env.tabletop.expert import Expert
from vlaexp.env.tabletop.gym import IDS, TabletopGym, register
from vlaexp.env.tabletop.rendering import APT_LINE
from vlaexp.env.tabletop.scene import COLOURS, PHRASINGS, PUSH_SIDES, RECEPTACLE_PHRASE, SHAPES
from vlaexp.env.tabletop.tasks import MAX_STEPS
from vlaexp.errors import UserError

SPECS = {"joint": JOINT_SPEC, "ee_delta": EE_DELTA_SPEC}


def hold(env: TabletopGym) -> np.ndarray:
    """The action that asks for nothing new."""
    if env.action_space.shape == (EE_DELTA_SPEC.dim,):
        return np.array([0, 0, 0, 0, 0, 0, 1], dtype=np.float32)
    return np.array([*env.world.command.q, 1.0], dtype=np.float32)


@pytest.mark.parametrize("action_space", SPECS)
@pytest.mark.parametrize("name", IDS)
def test_gymnasium_finds_nothing_wrong(name: str, action_space: str) -> None:
    env = gymnasium.make(name, action_space=action_space, render_mode="rgb_array")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env.unwrapped)
    # Actions are in rad and m on purpose, not within [-1, 1].
    assert [str(item.message) for item in caught if "symmetric and normalized" not in str(item.message)] == []
    spec = SPECS[action_space]
    np.testing.assert_array_equal(env.action_space.low, np.float32(spec.lower))
    np.testing.assert_array_equal(env.action_space.high, np.float32(spec.upper))
    assert env.metadata["render_fps"] == spec.fps
    env.close()


def test_registering_twice_changes_nothing() -> None:
    before = dict(gymnasium.registry)
    register()
    assert gymnasium.registry == before


def test_a_seed_is_the_same_episode_as_everywhere_else() -> None:
    env = gymnasium.make("vlaexp/Tabletop-v0")
    observation, info = env.reset(seed=77)
    assert info["seed"] == 77
    assert info["success"] is False
    world: TabletopEnv = env.unwrapped.world
    expected = world.observe()
    assert observation["instruction"] == expected.instruction == world.scene.instruction
    np.testing.assert_array_equal(observation["state"], expected.state)
    for camera in world.cameras:
        np.testing.assert_array_equal(observation["images"][camera], expected.images[camera])
    first = [env.reset()[1]["seed"] for _ in range(3)]
    env.reset(seed=77)
    assert [env.reset()[1]["seed"] for _ in range(3)] == first
    assert len(set(first)) == 3
    env.close()


@pytest.mark.parametrize("name", [name for name in IDS if name != "vlaexp/Tabletop-v0"])
def test_success_ends_the_episode_with_reward_one(name: str) -> None:
    env = gymnasium.make(name, action_space="ee_delta", render_mode="rgb_array")
    env.reset(seed=5)
    expert = Expert(env.unwrapped.world, np.random.default_rng(0))
    rewards, terminated, truncated = [], False, False
    while not (terminated or truncated):
        observation, reward, terminated, truncated, info = env.step(expert.act())
        assert observation in env.observation_space
        np.testing.assert_array_equal(env.render(), observation["images"]["front"])
        rewards.append(reward)
    assert terminated
    assert not truncated
    assert info["success"] is True
    assert rewards == [0.0] * (len(rewards) - 1) + [1.0]
    env.close()


@pytest.mark.parametrize("action_space", SPECS)
def test_time_runs_out_after_the_familys_steps(action_space: str) -> None:
    env = TabletopGym(action_space=action_space)
    families = set()
    for seed in range(4):
        env.reset(seed=seed)
        family = env.world.scene.family
        families.add(family)
        for step in range(MAX_STEPS[family]):
            _, reward, terminated, truncated, info = env.step(hold(env))
            assert reward == 0.0
            assert not terminated
            assert not info["success"]
            assert truncated == (step + 1 == MAX_STEPS[family])
    assert len(families) > 1
    env.close()


def test_an_unreachable_command_is_told() -> None:
    env = TabletopGym(["pick"], action_space="ee_delta")
    env.reset(seed=0)
    assert not env.step(hold(env))[4]["unreachable"]
    down = np.array([0, 0, -0.08, 0, 0, 0, 1], dtype=np.float32)
    assert any(env.step(down)[4]["unreachable"] for _ in range(10))
    env.close()


def test_every_instruction_is_in_the_space() -> None:
    space = TabletopGym().observation_space["instruction"]
    for phrasings in PHRASINGS.values():
        for phrasing in phrasings:
            for side, receptacle in zip([*PUSH_SIDES, ""], [*RECEPTACLE_PHRASE.values(), "", ""], strict=True):
                for name in (f"{colour} {shape}" for colour in COLOURS for shape in SHAPES):
                    assert phrasing.format(object=name, side=side, receptacle=receptacle) in space


def test_two_vector_environments_see_the_same() -> None:
    makers = [lambda: TabletopGym(["push"], action_space="ee_delta")] * 2
    sync = SyncVectorEnv(makers)
    # A forked child must not inherit this process's GL context.
    parallel = AsyncVectorEnv(makers, shared_memory=False, context="spawn")
    first, second = sync.reset(seed=[3, 4])[0], parallel.reset(seed=[3, 4])[0]
    action = np.tile(np.array([0.01, 0, 0, 0, 0, 0, 1], dtype=np.float32), (2, 1))
    for _ in range(3):
        assert first["instruction"] == second["instruction"]
        np.testing.assert_array_equal(first["state"], second["state"])
        for camera in TabletopEnv.cameras:
            assert first["images"][camera].shape == (2, 64, 64, 3)
            np.testing.assert_array_equal(first["images"][camera], second["images"][camera])
        first, second = sync.step(action)[0], parallel.step(action)[0]
    sync.close()
    parallel.close()


def test_shared_memory_is_refused_because_gymnasium_would_lose_the_instruction() -> None:
    with pytest.raises(ValueError, match="shared_memory=False"):
        AsyncVectorEnv([lambda: TabletopGym(["push"])], context="spawn")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"action_space": "joints"}, "unknown action space 'joints'; .*nearest: joint"),
        ({"render_mode": "human"}, "render_mode is 'human'; expected 'rgb_array' or None"),
        ({"scales": [1.0, 1.0]}, "unknown argument 'scales' .*nearest: scale"),
        ({"families": ["picks"]}, "unknown task family 'picks'; .*nearest: pick"),
    ],
)
def test_a_wrong_argument_says_what_is_wrong(settings: dict[str, object], text: str) -> None:
    with pytest.raises(UserError, match=text):
        TabletopGym(**settings)


def test_world_arguments_may_be_plain_data() -> None:
    only_red = {"colours": ["red", "blue"], "shapes": ["cube"], "only": [["red", "cube"]]}
    env = TabletopGym(["pick"], target_pool=only_red, image_size=32, camera_shift=[0.0, 0.1, 0.0])
    observation, _ = env.reset(seed=0)
    assert observation in env.observation_space
    assert observation["images"]["front"].shape == (32, 32, 3)
    assert "red cube" in observation["instruction"]
    env.close()


# Rendering


def test_closing_one_renderer_leaves_the_others_alone() -> None:
    one, two = TabletopGym(["pick"]), TabletopGym(["pick"])
    one.reset(seed=1)
    before = two.reset(seed=2)[0]["images"]["front"]
    one.close()
    np.testing.assert_array_equal(two.reset(seed=2)[0]["images"]["front"], before)
    np.testing.assert_array_equal(one.reset(seed=2)[0]["images"]["front"], before)  # and it opens again
    one.close()
    two.close()


def run_python(code: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """`code` in a fresh interpreter, which chooses its GL backend by itself."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


RENDER = """
from vlaexp.env.tabletop.gym import TabletopGym
env = TabletopGym(["pick"])
other = TabletopGym(["push"])
print(env.reset(seed=0)[0]["images"]["front"].sum(), other.reset(seed=0)[0]["images"]["front"].sum())
"""


@pytest.mark.parametrize("ending", ["", "env.close(); other.close()", "del env", "raise SystemExit(0)"])
def test_a_process_that_rendered_ends_in_silence(ending: str) -> None:
    done = run_python(RENDER + ending)
    assert done.returncode == 0
    assert done.stderr == ""
    assert all(int(total) > 0 for total in done.stdout.split())


WITHOUT_GL = """
import numpy as np
import vlaexp.env.tabletop.gym as tabletop
env = tabletop.TabletopGym(["pick"]).world
env.reset(0)
env.step(np.array([*env.command.q, 1.0]), env.action_specs["joint"])
print("physics works")
try:
    env.observe()
except tabletop.UserError as error:
    print(error)
"""


@pytest.mark.parametrize("backend", ["nonsense", "egl", "osmesa"])
def test_without_gl_physics_works_and_an_image_says_what_to_install(backend: str, tmp_path: Path) -> None:
    # Empty files in front of the real libraries: the loader finds them and cannot load them.
    for library in ("libEGL.so.1", "libEGL.so", "libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so"):
        (tmp_path / library).touch()
    done = run_python(WITHOUT_GL, MUJOCO_GL=backend, LD_LIBRARY_PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    first, text = done.stdout.strip().split("\n", 1)
    assert first == "physics works"
    assert re.fullmatch(rf"cannot render: GL backend '{backend}' does not start \(.+\); install it with .+", text)
    assert APT_LINE in text
    assert "MUJOCO_GL=egl|osmesa|glfw" in text


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere MuJoCo's default backend is the only one")
def test_mujoco_imported_first_is_named_as_the_reason() -> None:
    code = WITHOUT_GL.replace(
        "import numpy", "import warnings\nwarnings.simplefilter('ignore')\nimport mujoco\nimport numpy"
    )
    done = run_python(code, DISPLAY="")
    assert done.returncode == 0, done.stderr
    assert "mujoco was imported before vlaexp.env; set MUJOCO_GL=egl" in done.stdout


def test_the_world_never_imports_torch() -> None:
    code = "import sys, vlaexp.env.vector, vlaexp.env.tabletop.gym; print([m for m in sys.modules if m == 'torch'])"
    assert run_python(code).stdout.strip() == "[]"
