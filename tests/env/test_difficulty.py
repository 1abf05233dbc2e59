"""What success costs: chance, memory and deafness don't buy it. A success rate means something only above these."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import binomtest

from benchmarks.evidence_world import guess
from vlaexp.action_spec import ActionSpec
from vlaexp.env.tabletop.env import EE_DELTA_SPEC, JOINT_SPEC, TabletopEnv
from vlaexp.env.tabletop.expert import Expert
from vlaexp.env.tabletop.tasks import is_success

FIRST_SEED = 900_000  # the seeds of evaluation
ALPHA = 0.01


def slow_and_fast(fast: int, slow: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("episodes", [fast, pytest.param(slow, marks=pytest.mark.slow)])


@slow_and_fast(10, 100)
def test_random_actions_succeed_in_no_more_than_2_percent(family_env: TabletopEnv, episodes: int) -> None:
    rng = np.random.default_rng(0)
    successes = 0
    for seed in range(FIRST_SEED, FIRST_SEED + episodes):
        family_env.reset(seed)
        actions = rng.uniform(EE_DELTA_SPEC.lower, EE_DELTA_SPEC.upper, (family_env.max_steps, EE_DELTA_SPEC.dim))
        successes += any(family_env.step(action, EE_DELTA_SPEC).success for action in actions)
    assert binomtest(successes, episodes, 0.02, alternative="greater").pvalue > ALPHA, successes


@slow_and_fast(10, 100)
def test_a_demonstration_replayed_on_another_seed_seldom_succeeds(
    family_env: TabletopEnv, run_expert: Callable[..., object], episodes: int
) -> None:
    demonstrations = [run_expert(family_env, seed) for seed in range(episodes)]
    spaces: dict[str, ActionSpec] = {"joint": JOINT_SPEC, "ee_delta": EE_DELTA_SPEC}
    for space, spec in spaces.items():
        successes = 0
        for seed, demonstration in enumerate(demonstrations, start=FIRST_SEED):
            family_env.reset(seed)
            successes += any(family_env.step(action, spec).success for action in getattr(demonstration, space))
        assert successes <= 0.3 * episodes, (space, successes)


@slow_and_fast(30, 200)
def test_an_expert_that_ignores_the_instruction_succeeds_no_more_often_than_chance(
    family_env: TabletopEnv, episodes: int
) -> None:
    rng = np.random.default_rng(0)
    successes, odds = 0, []
    for seed in range(FIRST_SEED, FIRST_SEED + episodes):
        family_env.reset(seed)
        asked = family_env.scene
        heard, chance = guess(asked, rng)
        odds.append(chance)
        family_env.reset_to(heard)
        expert = Expert(family_env, rng)
        for _ in range(family_env.max_steps):
            family_env.step(expert.act(), EE_DELTA_SPEC)
            if is_success(asked, family_env.world):
                successes += 1
                break
    assert binomtest(successes, episodes, float(np.mean(odds)), alternative="greater").pvalue > ALPHA, successes
