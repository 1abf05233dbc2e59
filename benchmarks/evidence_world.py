"""Criteria of the embedded world: the expert is good, recordings replay, and nothing else succeeds by luck."""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context

import numpy as np
from hydra.utils import instantiate

from benchmarks.criteria import Found, measures
from vlaexp.config import compose
from vlaexp.env.tabletop.env import EE_DELTA_SPEC, JOINT_SPEC, TabletopEnv
from vlaexp.env.tabletop.expert import Expert
from vlaexp.env.tabletop.scene import FAMILIES, PUSH_SIDES, RECEPTACLES, Scene
from vlaexp.env.tabletop.tasks import is_success

FIRST_SEED = 900_000


@measures()
def expert_success() -> Iterator[Found]:
    for family, outcomes in by_family(expert_succeeds, 200).items():
        yield Found(f"expert success, {family}", float(np.mean(outcomes)), ">= 0.95", len(outcomes))


@measures()
def replay_from_its_seed() -> Iterator[Found]:
    for family, outcomes in by_family(replays_succeed, 100).items():
        for space, rate in zip(("joint", "ee_delta"), np.mean(outcomes, axis=0), strict=True):
            yield Found(
                f"noise-free recording replayed from its seed, {family}, {space}", rate, ">= 0.98", len(outcomes)
            )


@measures()
def random_policy() -> Iterator[Found]:
    for family, outcomes in by_family(random_succeeds, 200).items():
        yield Found(f"random actions, {family}", float(np.mean(outcomes)), "<= 0.02", len(outcomes))


@measures()
def replay_on_another_seed() -> Iterator[Found]:
    for family, outcomes in by_family(foreign_replays_succeed, 100).items():
        for space, rate in zip(("joint", "ee_delta"), np.mean(outcomes, axis=0), strict=True):
            yield Found(f"demonstration replayed on another seed, {family}, {space}", rate, "<= 0.3", len(outcomes))


@measures()
def deaf_expert() -> Iterator[Found]:
    for family, outcomes in by_family(deaf_succeeds, 300).items():
        success, chance = np.mean(outcomes, axis=0)
        # three standard errors of the sampling above what a guess gives
        bound = chance + 3 * np.sqrt(chance * (1 - chance) / len(outcomes))
        yield Found(f"expert that ignores the instruction, {family}", success, f"<= {bound:.4f}", len(outcomes))


def by_family(trial, episodes: int) -> dict[str, list]:  # type: ignore[no-untyped-def]
    """Outcomes of `trial(family, seed)` on the seeds of evaluation."""
    seeds = range(FIRST_SEED, FIRST_SEED + episodes)
    with ProcessPoolExecutor(2, get_context("forkserver")) as pool:
        return {family: list(pool.map(trial, [family] * episodes, seeds, chunksize=10)) for family in FAMILIES}


@cache
def world(family: str) -> TabletopEnv:
    return instantiate(compose("record", ["env=tabletop"]).env, families=[family], _convert_="all")


def expert_succeeds(family: str, seed: int) -> bool:
    return demonstrate(world(family), seed)[0]


def demonstrate(env: TabletopEnv, seed: int) -> tuple[bool, list[np.ndarray], list[np.ndarray]]:
    """Success of the expert, and its actions in joint and ee_delta."""
    env.reset(seed)
    expert = Expert(env, np.random.default_rng([seed, 1]))
    joint, ee_delta, success = [], [], False
    while not success and len(joint) < env.max_steps:
        ee_delta.append(expert.act())
        success = env.step(ee_delta[-1], EE_DELTA_SPEC).success
        joint.append(np.array([*env.command.q, env.command.gripper]))
    return success, joint, ee_delta


def replays_succeed(family: str, seed: int) -> tuple[bool, bool]:
    return replay(world(family), seed, seed)


def foreign_replays_succeed(family: str, seed: int) -> tuple[bool, bool]:
    return replay(world(family), seed - FIRST_SEED, seed)


def replay(env: TabletopEnv, recorded: int, seed: int) -> tuple[bool, bool]:
    """Success of the demonstration of seed `recorded` in the episode of `seed`, as joint targets and as ee_delta."""
    _, joint, ee_delta = demonstrate(env, recorded)
    outcomes = []
    for actions, spec in ((joint, JOINT_SPEC), (ee_delta, EE_DELTA_SPEC)):
        env.reset(seed)
        outcomes.append(any(env.step(action, spec).success for action in actions))
    return outcomes[0], outcomes[1]


def random_succeeds(family: str, seed: int) -> bool:
    env = world(family)
    env.reset(seed)
    rng = np.random.default_rng(seed)
    actions = rng.uniform(EE_DELTA_SPEC.lower, EE_DELTA_SPEC.upper, (env.max_steps, EE_DELTA_SPEC.dim))  # type: ignore[arg-type]
    return any(env.step(action, EE_DELTA_SPEC).success for action in actions)


def deaf_succeeds(family: str, seed: int) -> tuple[bool, float]:
    """Success of an expert that guesses what it was told, and the odds of the guess."""
    env, rng = world(family), np.random.default_rng(seed)
    env.reset(seed)
    asked = env.scene
    heard, odds = guess(asked, rng)
    env.reset_to(heard)
    expert = Expert(env, rng)
    for _ in range(env.max_steps):
        env.step(expert.act(), EE_DELTA_SPEC)
        if is_success(asked, env.world):
            return True, odds
    return False, odds


def guess(scene: Scene, rng: np.random.Generator) -> tuple[Scene, float]:
    """`scene` with a target drawn at random, and the odds of having drawn the right one."""
    guessed = dataclasses.replace(scene, target=int(rng.integers(len(scene.objects))))
    odds = 1 / len(scene.objects)
    if scene.side is not None:
        return dataclasses.replace(guessed, side=str(rng.choice(list(PUSH_SIDES)))), odds / len(PUSH_SIDES)
    if scene.receptacle is not None:
        return dataclasses.replace(guessed, receptacle=str(rng.choice(RECEPTACLES))), odds / len(RECEPTACLES)
    return guessed, odds
