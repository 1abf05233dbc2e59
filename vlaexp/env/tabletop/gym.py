"""The embedded world as Gymnasium environments, for tools that speak `gymnasium.make`.

    import vlaexp.env.tabletop.gym
    env = gymnasium.make("vlaexp/TabletopPick-v0", action_space="ee_delta", render_mode="rgb_array")

or, without the import, `gymnasium.make("vlaexp.env.tabletop.gym:vlaexp/TabletopPick-v0")`. `reset(seed=s)` begins the
episode that seed `s` has everywhere in vlaexp. Actions are in physical units (rad, m), hence not within [-1, 1].
`AsyncVectorEnv` needs `shared_memory=False`, and where this process has rendered already, `context="spawn"`.
"""

import string
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
import yaml
from gymnasium.error import CustomSpaceError
from gymnasium.vector.utils import create_shared_memory

from vlaexp.env.base import EnvObservation
from vlaexp.env.tabletop.env import FPS, STATE_NAMES, TabletopEnv
from vlaexp.env.tabletop.scene import FAMILIES, CameraPose, ObjectPool
from vlaexp.errors import UserError, nearest
from vlaexp.paths import config_dir

IDS: dict[str, tuple[str, ...]] = {
    "vlaexp/Tabletop-v0": FAMILIES,
    **{f"vlaexp/Tabletop{family.capitalize()}-v0": (family,) for family in FAMILIES},
}
LONGEST_INSTRUCTION = 64  # characters
# Wider than what the arm reaches: joints (rad), gripper opening, tool position (m), two columns of its rotation.
STATE_BOUND = np.array([*(2 * np.pi,) * 7, 1.5, *(1.5,) * 3, *(1.01,) * 6], dtype=np.float32)

Observation = dict[str, Any]


class Instruction(gymnasium.spaces.Text):
    """Text that refuses shared memory: Gymnasium (up to 1.4) reads it once, so every instruction would stay empty."""


@create_shared_memory.register(Instruction)
def _refuse_shared_memory(space: Instruction, n: int = 1, ctx: Any = None) -> Any:
    raise CustomSpaceError("Gymnasium does not update text in shared memory; pass shared_memory=False")


class TabletopGym(gymnasium.Env[Observation, np.ndarray]):
    """One arm, one table. Reward 1 and the end of the episode on success; truncated after the family's `max_steps`.

    Observations hold `images` (by camera, uint8 HWC), `state` (named by `STATE_NAMES`) and `instruction`; `info` holds
    `success`, `unreachable`, the episode's `seed` and under `privileged` what no policy may see.

    Args:
        families: task families to draw from.
        action_space: `joint` or `ee_delta`; see `vlaexp.env.tabletop.env`.
        render_mode: `rgb_array` or None; `render` returns the front camera.
        world: further arguments of `TabletopEnv`, as objects or plain data; the others are those of
            `conf/env/tabletop.yaml`.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": int(FPS)}  # noqa: RUF012

    def __init__(
        self,
        families: Sequence[str] = FAMILIES,
        action_space: str = "joint",
        render_mode: str | None = None,
        **world: Any,
    ) -> None:
        if action_space not in TabletopEnv.action_specs:
            raise UserError(f"unknown action space {action_space!r}; {nearest(action_space, TabletopEnv.action_specs)}")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise UserError(f"render_mode is {render_mode!r}; expected 'rgb_array' or None")
        settings = _world_settings(world)
        self._env = TabletopEnv(families=families, **settings)
        self._spec = TabletopEnv.action_specs[action_space]
        self.render_mode = render_mode
        assert self._spec.lower is not None
        assert self._spec.upper is not None
        self.action_space = gymnasium.spaces.Box(
            np.array(self._spec.lower, dtype=np.float32), np.array(self._spec.upper, dtype=np.float32)
        )
        shape = (settings["image_size"], settings["image_size"], 3)
        image = gymnasium.spaces.Box(0, 255, shape, np.uint8)
        self.observation_space = gymnasium.spaces.Dict(
            {
                "images": gymnasium.spaces.Dict(dict.fromkeys(self._env.cameras, image)),
                "state": gymnasium.spaces.Box(-STATE_BOUND, STATE_BOUND),
                "instruction": Instruction(LONGEST_INSTRUCTION, charset=string.ascii_lowercase + " "),
            }
        )
        assert len(STATE_NAMES) == len(STATE_BOUND)
        self._seed, self._steps = 0, 0
        self._seen: EnvObservation | None = None

    @property
    def world(self) -> TabletopEnv:
        """The environment inside."""
        return self._env

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin the episode of `seed`; without one, an episode drawn from the generator that the last seed started."""
        super().reset(seed=seed)
        self._seed = int(self.np_random.integers(2**31)) if seed is None else seed
        self._steps = 0
        self._env.reset(self._seed)
        return self._observe(), self._info(success=False, unreachable=False)

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        result = self._env.step(action, self._spec)
        self._steps += 1
        truncated = self._steps >= self._env.max_steps and not result.success
        info = self._info(result.success, result.unreachable)
        return self._observe(), float(result.success), result.success, truncated, info

    def render(self) -> np.ndarray | None:  # type: ignore[override]
        """The front camera's last image, or None without a render mode."""
        if self.render_mode is None:
            return None
        if self._seen is None:
            raise UserError("nothing to render yet; call reset() first")
        return self._seen.images["front"].copy()

    def close(self) -> None:
        self._env.close()

    def _observe(self) -> Observation:
        self._seen = self._env.observe()
        return {"images": self._seen.images, "state": self._seen.state, "instruction": self._seen.instruction}

    def _info(self, success: bool, unreachable: bool) -> dict[str, Any]:
        privileged = self._env.privileged_state()
        return {"success": success, "unreachable": unreachable, "seed": self._seed, "privileged": privileged}


def _world_settings(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `TabletopEnv` besides the families: those of conf/env/tabletop.yaml with `changes`."""
    settings = yaml.safe_load((config_dir() / "env" / "tabletop.yaml").read_text())
    del settings["_target_"], settings["families"]
    for name in changes:
        if name not in settings:
            raise UserError(f"unknown argument {name!r} of the embedded world; {nearest(name, settings)}")
    settings.update(changes)
    for name, kind in (("pool", ObjectPool), ("target_pool", ObjectPool), ("front_camera", CameraPose)):
        if isinstance(settings[name], Mapping):
            settings[name] = kind(**{key: value for key, value in settings[name].items() if key != "_target_"})
    return settings


def register() -> None:
    """Make the ids known to `gymnasium.make`; calling it again changes nothing."""
    for name, families in IDS.items():
        if name not in gymnasium.registry:
            gymnasium.register(name, "vlaexp.env.tabletop.gym:TabletopGym", kwargs={"families": list(families)})


register()
