"""OpenVLA through the true entry point, on a tiny checkpoint in the published format."""

from pathlib import Path

import pytest
import torch

from vlaexp import cli
from vlaexp.config import compose
from vlaexp.trainer.policy_folder import load_policy
from vlaexp.workflow.data import load_demonstrations, training_frames

AUTOREGRESSIVE = ["head=discrete_token", "head.decoding=autoregressive", "action_horizon=1", "n_action_steps=1"]
HEADS = {
    "autoregressive": AUTOREGRESSIVE,
    "parallel": ["head=discrete_token", "action_horizon=2", "n_action_steps=2"],
    "joint": ["head=joint", "action_horizon=4"],
    "diffusion": ["head=diffusion", "action_horizon=4"],
    "flow": ["head=flow", "head.num_steps=2", "head.samples_per_observation=2", "action_horizon=4"],
}


@pytest.mark.parametrize("head", HEADS)
def test_train_save_load_act(head: str, small: list[str], outputs: Path, openvla_weights: Path) -> None:
    model = ["model=openvla_7b", f"model.weights={openvla_weights}", "lora=r4", "freeze=all"]
    parts = ["lora.targets=all-linear", "augmentation=none", "name=openvla"]
    steps = ["trainer.max_steps=2", "trainer.batch_size=2", "trainer.max_val_samples=4", "cache.mode=none"]
    overrides = [*(key for key in small if "weights" not in key), *model, *parts, *steps, *HEADS[head]]
    assert cli.main(["train", *overrides]) == 0
    (folder,) = outputs.glob("runs/openvla-*/milestones/step_000002")
    policies = [load_policy(folder) for _ in range(2)]
    cfg = compose("train", overrides)
    demos = load_demonstrations(cfg)
    frames, _ = training_frames(
        {"cache": {"mode": "none", "limit_gb": 0}, "augmentation": None}, demos, policies[0].model, outputs
    )
    observation = demos.chunks([0], frames, 1, False).__getitems__([0, 5]).observation
    actions = []
    for policy in policies:
        policy.reset([0, 1], [0, 1], [{}, {}])
        actions.append(policy.act(observation).action)
    assert actions[0].isfinite().all()
    assert torch.equal(actions[0], actions[1])
