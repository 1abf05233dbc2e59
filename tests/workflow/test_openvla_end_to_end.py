"""OpenVLA through the true entry point, on a tiny checkpoint in the published format."""

from pathlib import Path

import pytest
import torch

from vlaexp import cli
from vlaexp.config import compose
from vlaexp.model.openvla import OpenVLA
from vlaexp.trainer.dry_run import made_up_batch
from vlaexp.trainer.policy_folder import load_policy
from vlaexp.workflow.data import load_demonstrations, training_frames
from vlaexp.workflow.train import build

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


@pytest.mark.parametrize("decoding", ["autoregressive", "parallel"])
def test_logits_are_of_action_tokens_alone(small: list[str], openvla_weights: Path, decoding: str) -> None:
    """Not of image and prompt, whose 32,064 words would take most of the memory; the loss is that of all positions."""
    model = [
        "model=openvla_7b",
        f"model.weights={openvla_weights}",
        "lora=none",
        "freeze=backbone",
        "augmentation=none",
    ]
    keys = [
        "head=discrete_token",
        f"head.decoding={decoding}",
        "head.label_sigma=0.0",
        "action_horizon=2",
        "n_action_steps=1",
        "name=tokens",
    ]
    head = build(compose("train", [*(key for key in small if "weights" not in key), *model, *keys])).head.eval()
    assert isinstance(head.model, OpenVLA)
    batch, positions, whole = made_up_batch(head, 3), [], []
    run = head.model._run

    def kept(*args: torch.Tensor) -> object:
        hidden, layers = run(*args)
        whole.append(hidden)
        return hidden, layers

    head.model._run = kept  # type: ignore[method-assign,assignment]
    head.model.decoder.lm_head.register_forward_pre_hook(lambda _, given: positions.append(given[0].shape[1]))
    loss, _ = head.compute_loss(batch)
    count = sum(positions)
    assert count == 2 * head.spec.dim + (decoding == "autoregressive")  # and the end token
    hidden = torch.cat(whole, 1)
    assert hidden.shape[1] > count + 10
    vocabulary = head.model.action_vocabulary
    logits = vocabulary.logits(hidden)[:, -count:]
    wanted = vocabulary.last - head.bins.encode(head.action_norm.normalize(batch.action)).flatten(1)
    if decoding == "autoregressive":
        wanted = torch.nn.functional.pad(wanted, (0, 1), value=vocabulary.end)
    everywhere = torch.nn.functional.cross_entropy(logits.mT, wanted)
    torch.testing.assert_close(loss, everywhere, rtol=1e-5, atol=1e-5)
