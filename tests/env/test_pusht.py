"""PushT: gym-pusht's own episodes, rewards and success; what the splits change; what is refused."""

import subprocess
import sys
from dataclasses import replace
from functools import partial

import gymnasium
import numpy as np
import pytest

from vlaexp.action_spec import ActionSpec
from vlaexp.config import compose, resolved
from vlaexp.env.pusht import INSTRUCTION, PUSHT_SPEC, PushT
from vlaexp.env.tabletop.env import JOINT_SPEC
from vlaexp.env.vector import VectorEnv
from vlaexp.errors import UserError

SEED = 900_000


@pytest.fixture
def env():
    env = PushT()
    env.reset(SEED)
    return env


@pytest.fixture
def actions():
    return np.random.default_rng(0).uniform(0, 512, (40, 2))


def put_block(env, x, y, angle):
    block = env._world.block
    block.angle, block.position = angle, (x, y)


def test_it_is_gym_pusht_step_by_step(env, actions):
    import gym_pusht  # noqa: F401  # registers the id

    reference = gymnasium.make("gym_pusht/PushT-v0", obs_type="pixels_agent_pos", disable_env_checker=True)
    seen, _ = reference.reset(seed=SEED)
    touched = False
    for action in actions:
        mine = env.observe()
        np.testing.assert_array_equal(mine.images["front"], seen["pixels"])
        np.testing.assert_allclose(mine.state, seen["agent_pos"], rtol=1e-6)
        result = env.step(action, PUSHT_SPEC)
        seen, reward, done, _, info = reference.step(action)
        assert (result.success, result.measures) == (done, {"coverage": info["coverage"], "reward": reward})
        touched |= info["n_contacts"] > 0
    assert touched
    assert mine.instruction == INSTRUCTION
    assert reference.spec.max_episode_steps == env.max_steps
    assert reference.metadata["render_fps"] == env.fps


def test_the_same_seed_is_the_same_episode(env, actions):
    other = PushT()
    other.reset(SEED + 1)
    assert other.describe() != env.describe()
    other.reset(SEED)
    for action in actions:
        env.step(action, PUSHT_SPEC)
        other.step(action, PUSHT_SPEC)
    assert env.privileged_state() == other.privileged_state()


def test_rows_in_workers_are_rows_in_this_process(actions):
    found = []
    for workers in (0, 2):
        with VectorEnv(partial(PushT, max_steps=20), 3, workers) as envs:
            scenes = envs.reset({row: SEED + row for row in range(3)})
            results = envs.execute(dict.fromkeys(range(3), actions), PUSHT_SPEC)
            images = [envs.observe([row])[row].images["front"].tolist() for row in range(3)]
        assert [(result.steps, result.finished) for result in results.values()] == [(20, True)] * 3
        found.append((scenes, [result.trace for result in results.values()], images))
    assert found[0] == found[1]


@pytest.mark.parametrize(("shift", "success"), [(0.0, True), (1.0, True), (3.0, False), (200.0, False)])
def test_success_is_coverage_above_95_percent(env, shift, success):
    x, y, angle = env.describe()["goal"]
    put_block(env, x + shift, y, angle)
    env._world.agent.position = (20, 20)
    result = env.step(np.array([20.0, 20.0]), PUSHT_SPEC)
    coverage, reward = result.measures["coverage"], result.measures["reward"]
    assert result.success == success == (coverage > 0.95)
    assert reward == pytest.approx(min(1.0, coverage / 0.95))
    assert (coverage == 0) == (shift == 200)


def test_a_step_does_not_render(env, monkeypatch):
    monkeypatch.setattr(env._world, "_draw", lambda: pytest.fail("rendered"))
    env.step(np.array([256.0, 256.0]), PUSHT_SPEC)


def test_a_target_beyond_the_table_is_replaced_by_the_nearest(env):
    other = PushT()
    other.reset(SEED)
    assert env.step(np.array([600.0, -5.0]), PUSHT_SPEC).unreachable
    assert not other.step(np.array([512.0, 0.0]), PUSHT_SPEC).unreachable
    assert env.privileged_state() == other.privileged_state()


def test_targets_against_the_measured_state(env):
    """They count from where the disc was when the chunk began."""
    other = PushT()
    other.reset(SEED)
    start = np.array(env.describe()["agent"])
    relative = replace(PUSHT_SPEC, reference="measured_state", lower=None, upper=None)
    for offset in ([20.0, 30.0], [40.0, 20.0]):
        env.step(np.array(offset), relative)
        other.step(start + offset, PUSHT_SPEC)
    assert env.privileged_state() == other.privileged_state()


def test_what_the_splits_change(env, actions):
    splits = resolved(compose("eval", ["eval=pusht", "policy=random"]).eval)["splits"]
    assert list(splits) == ["nominal", "unseen_colour", "sliding_block"]
    red, sliding = (PushT(**splits[name]["env"]) for name in ("unseen_colour", "sliding_block"))
    for other in (red, sliding):
        other.reset(SEED)
    image, of_red, of_sliding = (world.observe().images["front"] for world in (env, red, sliding))
    assert (image != of_red).any(-1).mean() > 0.02  # the block's share of the picture
    np.testing.assert_array_equal(image, of_sliding)
    for action in actions:
        for world in (env, red, sliding):
            world.step(action, PUSHT_SPEC)
    assert red.privileged_state() == env.privileged_state() != sliding.privileged_state()


def test_the_card_of_the_hub_dataset_is_the_spec_of_the_world():
    cfg = compose("train", ["dataset=pusht", "action_space=native", "head=regression"])
    assert (cfg.dataset.repo_id, cfg.env["_target_"]) == ("lerobot/pusht", "vlaexp.env.pusht.PushT")
    card = resolved(cfg.dataset)["card"]
    assert ActionSpec.from_dict(card["action_spaces"]["native"]["spec"]) == PUSHT_SPEC
    assert list(card["cameras"]) == list(PushT.cameras)


def test_it_prints_nothing():
    """pygame would greet on stdout, where `format=json` prints."""
    done = subprocess.run(
        [sys.executable, "-c", "from vlaexp.env.pusht import PushT; PushT().reset(0)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_refusals(env, monkeypatch):
    with pytest.raises(UserError, match=r"shape \(8,\) in space 'joint'; expected \(2,\) in native, .* dataset=pusht"):
        env.step(np.zeros(8), JOINT_SPEC)
    with pytest.raises(UserError, match=r"shape \(3,\) in space 'native'; expected \(2,\)"):
        env.step(np.zeros(3), PUSHT_SPEC)
    with pytest.raises(UserError, match=r"action \[nan, 0.0\] is not finite; check the policy's weights and norm"):
        env.step(np.array([np.nan, 0.0]), PUSHT_SPEC)
    with pytest.raises(UserError, match=r"against 'previous_command'; set action_space.reference=absolute"):
        env.step(np.zeros(2), replace(PUSHT_SPEC, reference="previous_command"))
    with pytest.raises(UserError, match=r"no episode yet; call reset\(seed\) first"):
        PushT().observe()
    with pytest.raises(UserError, match=r"env.damping=1.5; expected 0 \(the block stops at once\) to 1"):
        PushT(damping=1.5)
    with pytest.raises(UserError, match=r"env.block_colour='mauvish' is no colour of pygame; try red"):
        PushT(block_colour="mauvish")
    monkeypatch.setitem(sys.modules, "gym_pusht", None)
    with pytest.raises(UserError, match=r"env=pusht needs gym-pusht \(.*\); run: pip install 'vlaexp\[pusht\]'"):
        PushT()
