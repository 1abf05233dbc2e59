"""The alternative that the speeds are held against: LeRobot's ACT on LeRobot's own loader and evaluation loop."""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from lerobot.configs import FeatureType
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.factory import make_pre_post_processors
from lerobot.processor import PolicyProcessorPipeline
from lerobot.scripts.lerobot_eval import rollout
from lerobot.utils.feature_utils import dataset_to_policy_features
from torch.utils.data import DataLoader

from vlaexp.data_types import ActionChunk, Observation
from vlaexp.env.tabletop.env import JOINT_SPEC
from vlaexp.env.tabletop.gym import TabletopGym

HORIZON, EXECUTED = 12, 4


class Act:
    """An untrained ACT of LeRobot's default size for a recorded dataset, with its processors."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.dataset = LeRobotDataset(f"local/{root.name}", root=root, delta_timestamps=self._chunk(root))
        features = dataset_to_policy_features(self.dataset.meta.features)
        outputs = {name: feature for name, feature in features.items() if feature.type is FeatureType.ACTION}
        inputs = {name: feature for name, feature in features.items() if name not in outputs}
        config = ACTConfig(
            input_features=inputs,
            output_features=outputs,
            chunk_size=HORIZON,
            n_action_steps=EXECUTED,
            pretrained_backbone_weights=None,
            device="cpu",
        )
        self.policy = ACTPolicy(config)
        stats: Any = self.dataset.meta.stats
        self.before, self.after = make_pre_post_processors(config, dataset_stats=stats)

    @staticmethod
    def _chunk(root: Path) -> dict[str, list[float]]:
        fps = LeRobotDataset(f"local/{root.name}", root=root).meta.fps
        return {"action": [step / fps for step in range(HORIZON)]}

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.policy.parameters())

    def loader(self, batch_size: int, workers: int) -> DataLoader[Any]:
        return DataLoader(self.dataset, batch_size, shuffle=True, num_workers=workers, drop_last=True)

    def samples_per_second(self, batch_size: int, steps: int) -> float:
        """Training: LeRobot's loader with two workers, forward, backward, AdamW."""
        self.policy.train()
        optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-5)
        began, done = 0.0, -1  # the first step warms up
        for batch in self.loader(batch_size, 2):
            if done == 0:
                began = time.perf_counter()
            loss, _ = self.policy.forward(self.before(batch))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 10.0)
            optimizer.step()
            done += 1
            if done == steps:
                break
        return done * batch_size / (time.perf_counter() - began)

    def episodes_per_second(self, world: dict[str, Any], seeds: Sequence[int], rows: int) -> float:
        """`lerobot_eval.rollout` on `rows` asynchronous environments that have started, a batch of seeds at a time."""
        self.policy.eval()
        makers = [lambda: Pixels(world) for _ in range(rows)]
        envs = gymnasium.vector.AsyncVectorEnv(makers, shared_memory=False, context="spawn")
        same: Any = PolicyProcessorPipeline(steps=[])
        with contextlib.closing(envs):
            envs.reset(seed=list(seeds[:rows]))
            began = time.perf_counter()
            for first in range(0, len(seeds), rows):
                batch = list(seeds[first : first + rows])
                rollout(envs, self.policy, same, same, self.before, self.after, seeds=batch)
            return len(seeds) / (time.perf_counter() - began)


class ActInVlaexp:
    """The same ACT as a `vlaexp.data_types.Policy`, so that two evaluation loops run one policy."""

    n_action_steps, n_obs_steps = EXECUTED, 1

    def __init__(self, act: Act) -> None:
        self._act = act

    def reset(self, seeds: Sequence[int], env_ids: Sequence[int], episodes: Sequence[dict[str, Any]]) -> None:
        self._act.policy.eval()

    def act(self, observation: Observation) -> ActionChunk:
        batch: dict[str, Any] = {
            f"observation.images.{name}": image[:, -1].float() / 255 for name, image in observation.images.items()
        }
        batch |= {"observation.state": observation.state[:, -1], "task": observation.instruction}
        with torch.inference_mode():
            chunk = self._act.policy.predict_action_chunk(self._act.before(batch))
            return ActionChunk(self._act.after(chunk).cpu(), JOINT_SPEC)


class Pixels(gymnasium.Env[dict[str, Any], np.ndarray]):
    """The embedded world with the observation keys that LeRobot's evaluation reads."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, world: dict[str, Any]) -> None:
        self._env = TabletopGym(action_space="joint", **world)
        spaces = self._env.observation_space
        assert isinstance(spaces, gymnasium.spaces.Dict)
        self.observation_space = gymnasium.spaces.Dict({"pixels": spaces["images"], "agent_pos": spaces["state"]})
        self.action_space = self._env.action_space
        self.task = self.task_description = ""
        self._max_episode_steps = self._env.world.max_steps

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        observation, _ = self._env.reset(seed=seed)
        self.task_description = observation["instruction"]
        return self._keys(observation), {"is_success": False}

    def step(self, action: np.ndarray) -> Any:
        observation, reward, terminated, truncated, info = self._env.step(action)
        return self._keys(observation), reward, terminated, truncated, {"is_success": info["success"]}

    def close(self) -> None:
        self._env.close()

    def _keys(self, observation: dict[str, Any]) -> dict[str, Any]:
        return {"pixels": observation["images"], "agent_pos": observation["state"]}
