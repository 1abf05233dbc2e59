"""A small LeRobotDataset v3 with the columns of lerobot/pusht: a simple policy rolled out in gym-pusht."""

from pathlib import Path

import numpy as np

from vlaexp.dataset.lerobot import quiet_lerobot
from vlaexp.env.pusht import INSTRUCTION, PUSHT_SPEC, PushT

EPISODES, STEPS = 6, 30
FIRST_SEED = 1000
REACH = 60.0  # pixel: how far ahead of the disc its target is
NOISE = 4.0  # pixel
MOTORS = {"dtype": "float32", "shape": (2,), "names": {"motors": ["motor_0", "motor_1"]}}
FEATURES = {
    "observation.image": {"dtype": "image", "shape": (96, 96, 3), "names": ["height", "width", "channel"]},
    "observation.state": MOTORS,
    "action": MOTORS,
    "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
    "next.done": {"dtype": "bool", "shape": (1,), "names": None},
    "next.success": {"dtype": "bool", "shape": (1,), "names": None},
}


def toward_the_block(env: PushT, rng: np.random.Generator) -> np.ndarray:
    """The target of a policy that runs into the block."""
    agent, block = (np.array(env.describe()[name][:2]) for name in ("agent", "block"))
    way = block - agent
    target = agent + way * min(1.0, REACH / max(float(np.linalg.norm(way)), 1.0)) + rng.normal(0, NOISE, 2)
    return np.clip(target, PUSHT_SPEC.lower, PUSHT_SPEC.upper)


def write(folder: Path) -> Path:
    """Write the dataset into `folder`, which must not exist."""
    with quiet_lerobot():
        from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset.create("local/pusht", fps=10, features=FEATURES, root=folder, use_videos=False)
    env, rng = PushT(), np.random.default_rng(0)
    for seed in range(FIRST_SEED, FIRST_SEED + EPISODES):
        env.reset(seed)
        for step in range(STEPS):
            seen, action = env.observe(), toward_the_block(env, rng)
            result = env.step(action, PUSHT_SPEC)
            dataset.add_frame(
                {
                    "observation.image": seen.images["front"],
                    "observation.state": seen.state,
                    "action": action.astype(np.float32),
                    "next.reward": np.array([result.measures["reward"]], dtype=np.float32),
                    "next.done": np.array([step == STEPS - 1]),
                    "next.success": np.array([result.success]),
                    "task": INSTRUCTION,
                }
            )
        dataset.save_episode()
    dataset.finalize()
    return folder
