"""The worlds that the tests of `vlaexp.env` share, and what they do to them."""

from collections.abc import Callable
from dataclasses import dataclass

import hydra
import numpy as np
import pytest

from vlaexp.config import compose
from vlaexp.env.tabletop.env import EE_DELTA_SPEC, TabletopEnv  # before mujoco: chooses the GL backend
from vlaexp.env.tabletop.expert import Expert
from vlaexp.env.tabletop.scene import FAMILIES

import mujoco  # isort: skip


@dataclass(frozen=True)
class Rollout:
    """Whether an expert's episode ended in success, and its actions in both spaces: (steps, 7) and (steps, 8)."""

    success: bool
    ee_delta: np.ndarray
    joint: np.ndarray


@pytest.fixture(scope="session")
def make_env() -> Callable[..., TabletopEnv]:
    """Builds the world of conf/env/tabletop.yaml for one family or several, with changes."""

    def make(*families: str, **changes: object) -> TabletopEnv:
        config = compose("record", ["env=tabletop"]).env
        return hydra.utils.instantiate(config, families=list(families or FAMILIES), **changes, _convert_="all")

    return make


@pytest.fixture(scope="session", params=FAMILIES)
def family_env(request: pytest.FixtureRequest, make_env: Callable[..., TabletopEnv]) -> TabletopEnv:
    """One world per task family, each a test of its own."""
    return make_env(request.param)


@pytest.fixture(scope="session")
def run_expert() -> Callable[..., Rollout]:
    """Lets the expert play the episode of a seed until success or the time limit."""

    def run(env: TabletopEnv, seed: int, defect: str | None = None) -> Rollout:
        env.reset(seed)
        expert = Expert(env, np.random.default_rng([seed, 1]), defect)
        ee_delta, joint, success = [], [], False
        while not success and len(joint) < env.max_steps:
            ee_delta.append(expert.act())
            success = env.step(ee_delta[-1], EE_DELTA_SPEC).success
            joint.append([*env.command.q, env.command.gripper])
        return Rollout(success, np.array(ee_delta), np.array(joint))

    return run


@pytest.fixture(scope="session")
def put_object() -> Callable[..., None]:
    """Sets the pose and velocity of an object by hand, without a step of physics."""

    def put(
        env: TabletopEnv,
        slot: int,
        position: tuple[float, float, float] | np.ndarray,
        velocity: tuple[float, float, float] = (0.0, 0.0, 0.0),
    ) -> None:
        model, data = env.world.model, env.world.data
        joint = int(model.body(f"object{slot}").jntadr[0])
        qpos, dof = int(model.jnt_qposadr[joint]), int(model.jnt_dofadr[joint])
        data.qpos[qpos : qpos + 7] = [*position, 1.0, 0.0, 0.0, 0.0]
        data.qvel[dof : dof + 6] = [*velocity, 0.0, 0.0, 0.0]
        mujoco.mj_forward(model, data)

    return put
