from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from vlaexp.data_types import Batch
from vlaexp.errors import UserError
from vlaexp.head.joint import JointHead
from vlaexp.trainer.build import build_head
from vlaexp.workflow.train import Parts

Make = Callable[..., Parts]
LoadBatch = Callable[[Parts, list[int]], Batch]


@pytest.fixture
def parts(make: Make) -> Parts:
    return make("head=joint")


def test_targets_are_clipped_to_the_joint_limits(parts: Parts, load_batch: LoadBatch) -> None:
    head, batch = parts.head.eval(), load_batch(parts, [0, 30])
    lower, upper = (torch.tensor(bound) for bound in (head.spec.lower, head.spec.upper))
    for bias, bound in ((1e3, upper), (-1e3, lower)):
        head.readout.out.bias.data.fill_(bias)
        action = head.predict_action(batch.observation).action
        torch.testing.assert_close(action, bound.expand_as(action), rtol=0, atol=1e-4)


def test_targets_inside_the_limits_are_left_alone(parts: Parts, load_batch: LoadBatch) -> None:
    head, batch = parts.head.eval(), load_batch(parts, [0, 30])
    torch.nn.init.zeros_(head.readout.out.weight)
    torch.nn.init.zeros_(head.readout.out.bias)
    prefix, noise = head.prefix(batch.observation), torch.zeros_like(batch.action)
    torch.testing.assert_close(head.predict(prefix, noise), head.skip(prefix), rtol=1e-4, atol=1e-4)


def test_training_starts_from_staying_where_the_arm_is(parts: Parts, load_batch: LoadBatch) -> None:
    """The measured joint angles are the first seven dimensions of the state."""
    head, batch = parts.head.eval(), load_batch(parts, [0, 30, 60])
    assert head.spec.measured_by is not None
    measured = batch.observation.state[:, -1, list(head.spec.measured_by)]
    stay = head.action_norm.unnormalize(head.skip(head.prefix(batch.observation)))
    torch.testing.assert_close(stay, measured[:, None].expand_as(stay), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("norm", "power"), [("mse", 2), ("l1", 1)])
def test_norms(make: Make, load_batch: LoadBatch, norm: str, power: int) -> None:
    parts = make("head=joint", f"head.norm={norm}")
    head, batch = parts.head.eval(), load_batch(parts, [0, 30])
    prefix = head.prefix(batch.observation)
    action = head.action_norm.normalize(batch.action)
    wanted = ((head._prediction(prefix) - action).abs() ** power).mean()
    torch.testing.assert_close(head.loss(prefix, action, torch.ones(2, 6)), wanted)


def rebuilt(parts: Parts, **spec: object) -> JointHead:
    return build_head(parts.config, parts.head.model, replace(parts.demos.spec, **spec), parts.head.norm_stats)


def test_robot_without_limits_is_refused(parts: Parts) -> None:
    with pytest.raises(UserError, match=r"joint limits of 'tabletop_arm'; give lower and upper in .*vlaexp\.yaml"):
        rebuilt(parts, lower=None, upper=None)


def test_joint_that_turns_more_than_once_is_refused(parts: Parts) -> None:
    spec = parts.demos.spec
    with pytest.raises(UserError, match=rf"\['{spec.names[2]}'\] turn more than once.*action_space=ee_delta"):
        rebuilt(parts, lower=(*spec.lower[:2], -4.0, *spec.lower[3:]), upper=(*spec.upper[:2], 4.0, *spec.upper[3:]))
