"""Dead adapters: what is reported dead changes neither loss nor actions, what is not changes one of them."""

import json
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from vlaexp import manifest
from vlaexp.config import compose
from vlaexp.head.base import Head
from vlaexp.ledger import adapters
from vlaexp.trainer.dry_run import find_dead_adapters, made_up_batch, training_loss
from vlaexp.workflow.train import build, train

TINY = ["model.image_size=16", "model.width=32", "model.depth=1", "model.decoder_depth=1", "action_horizon=6"]
ALL = ["lora=r4", "lora.targets=all-linear", "freeze=all", "name=ledger"]
CASES = {
    "joint": ["head=joint"],
    "discrete_token": ["head=discrete_token"],
    "linear": ["head=linear", "action_space=joint"],
    "one step": ["head=linear", "action_space=joint", "action_horizon=1", "n_action_steps=1"],
    "no goal loss": ["head=joint", "head.goal_weight=0.0"],
    "dora": ["head=linear", "action_space=joint", "lora.dora=true"],
}


@pytest.fixture(params=CASES)
def head(request: pytest.FixtureRequest, small: list[str]) -> Head:
    return build(compose("train", [*small, *TINY, *ALL, *CASES[request.param]])).head


def outcome(head: Head, seed: int) -> tuple[Tensor, Tensor]:
    """Loss and actions on another batch than the one that was used to find them."""
    batch = made_up_batch(head, 4, seed=seed)
    with torch.no_grad():
        return training_loss(head, batch), head.eval().predict_action(batch.observation).action


def test_dead_is_what_changes_nothing(head: Head) -> None:
    dead = find_dead_adapters(head)
    assert not any(bool(p.any()) for n, p in head.named_parameters() if "lora_B" in n), "adapters are as they were"
    base = outcome(head, 7)
    for name, own in adapters(head.model).items():
        kept = {key: parameter.detach().clone() for key, parameter in own.items()}
        for parameter in own.values():
            nn.init.normal_(parameter, std=3.0)
        same = all(torch.equal(a, b) for a, b in zip(base, outcome(head, 7), strict=True))
        assert same == (name in dead), name
        for key, parameter in own.items():
            parameter.data.copy_(kept[key])


def test_the_decoder_is_dead_under_a_linear_readout(small: list[str]) -> None:
    head = build(compose("train", [*small, *TINY, *ALL, *CASES["linear"]])).head
    decoder = [name for name in adapters(head.model) if name.startswith("decoder.")]
    assert find_dead_adapters(head) == decoder


def test_what_acts_through_a_detached_tensor_is_not_dead(small: list[str]) -> None:
    """Without its loss the goal gets no gradient, but the decoder reads it."""
    head = build(compose("train", [*small, *TINY, *ALL, *CASES["no goal loss"]])).head
    loss = training_loss(head, made_up_batch(head, 2))
    goal = adapters(head.model)["language.goal"]["B.default.weight"]
    assert torch.autograd.grad(loss, goal, allow_unused=True) == (None,)
    assert "language.goal" not in find_dead_adapters(head)


def test_a_model_without_adapters_has_no_dead_ones(small: list[str]) -> None:
    head = build(compose("train", [*small, *TINY, "lora=none", "name=ledger"])).head
    assert find_dead_adapters(head) == []


def test_finding_them_leaves_no_trace(head: Head) -> None:
    head.train()
    state = torch.random.get_rng_state()
    before = {name: parameter.detach().clone() for name, parameter in head.named_parameters()}
    find_dead_adapters(head)
    assert head.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in head.parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in head.named_parameters())


def test_trained_adapters_are_judged_alike(small: list[str]) -> None:
    head = build(compose("train", [*small, *TINY, *ALL, *CASES["linear"]])).head
    fresh = find_dead_adapters(head)
    for own in adapters(head.model).values():
        nn.init.normal_(own["B.default.weight"])
    assert find_dead_adapters(head) == fresh


def excluded(dead: Sequence[str]) -> str:
    return f"lora.exclude=[{','.join(dead)}]"


def test_every_manifest_names_them_and_the_offer_removes_them(small: list[str]) -> None:
    overrides = [*small, *TINY, *ALL, *CASES["linear"], "trainer.max_steps=2", "trainer.milestones=[1]"]
    result = train(compose("train", overrides))
    dead = [manifest.read(folder)["adaptation"]["dead_adapters"] for folder in result.milestones.values()]
    assert len(dead) == 2
    assert dead[0] == dead[1] != []
    json.dumps(dead)
    smaller = build(compose("train", [*overrides, excluded(dead[0])]))
    assert find_dead_adapters(smaller.head) == []
    assert not set(smaller.ledger.adapted_modules) & set(dead[0])
