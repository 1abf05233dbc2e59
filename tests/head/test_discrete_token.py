from collections.abc import Callable

import pytest
import torch

from vlaexp.data_types import Batch
from vlaexp.head.discrete_token import MARGIN, ActionBins, DiscreteTokenHead
from vlaexp.workflow.train import Parts

Make = Callable[..., Parts]
LoadBatch = Callable[[Parts, list[int]], Batch]
AUTOREGRESSIVE = "head.decoding=autoregressive"


def make_bins(bins: int = 256) -> tuple[ActionBins, torch.Tensor, torch.Tensor]:
    low = torch.tensor([[-1.0, -0.1, 0.0]] * 4)
    high = torch.tensor([[2.0, 0.3, 1.0]] * 4)
    return ActionBins(low, high, bins), low, high


def head_of(make: Make, *overrides: str) -> DiscreteTokenHead:
    head = make("head=discrete_token", *overrides).head.eval()
    assert isinstance(head, DiscreteTokenHead)
    return head


@pytest.mark.parametrize("count", [2, 16, 256, 1024])
def test_token_round_trip_is_within_half_a_bin(count: int) -> None:
    bins, low, high = make_bins(count)
    action = low + torch.rand(500, 4, 3) * (high - low)
    tokens = bins.encode(action)
    assert tokens.min() >= 0
    assert tokens.max() < count
    half = (1 + 2 * MARGIN) * (high - low) / (count - 1) / 2
    assert ((bins.decode(tokens) - action).abs() <= half + 1e-6).all()


def test_every_token_is_its_own_round_trip() -> None:
    bins, _, _ = make_bins()
    tokens = torch.arange(256)[:, None, None].expand(-1, 4, 3)
    assert torch.equal(bins.encode(bins.decode(tokens)), tokens)


def test_values_beyond_the_quantiles_are_clipped() -> None:
    bins, low, high = make_bins()
    assert (bins.encode(low[None] - 5) == 0).all()
    assert (bins.encode(high[None] + 5) == 255).all()
    torch.testing.assert_close(bins.decode(bins.encode(high[None] + 5))[0], high + MARGIN * (high - low))


def test_constant_dimension_stays_finite() -> None:
    bins = ActionBins(torch.zeros(2, 1), torch.zeros(2, 1), 256)
    decoded = bins.decode(bins.encode(torch.zeros(3, 2, 1)))
    assert decoded.abs().max() < 1e-3


def test_bins_span_the_quantiles_of_the_training_actions(make: Make) -> None:
    head = head_of(make)
    statistics = head.norm_stats.quantities["action"]
    low, high = (head.action_norm.normalize(torch.tensor(q).float()) for q in (statistics.q01, statistics.q99))
    assert (head.bins.low <= low).all()
    assert (head.bins.high >= high).all()


def test_number_of_bins_comes_from_the_configuration(make: Make) -> None:
    for overrides, bins in (([], 256), (["head.bins=32"], 32)):
        head = head_of(make, *overrides)
        assert head.bins.bins == bins
        assert head.readout.out.out_features == bins * head.spec.dim


def uniform_logits(head: DiscreteTokenHead) -> torch.Tensor:
    return torch.zeros(2, head.action_horizon, head.spec.dim, head.bins.bins)


@pytest.mark.parametrize("sigma", [0.0, 0.5, 3.0])
def test_labels_sum_to_1(make: Make, sigma: float) -> None:
    head = head_of(make, f"head.label_sigma={sigma}")
    action = torch.randn(2, head.action_horizon, head.spec.dim)
    loss = head._cross_entropy(uniform_logits(head), action)  # of uniform logits it is log(bins) times the sum
    torch.testing.assert_close(loss, torch.full_like(loss, head.bins.bins).log())


def test_soft_label_of_no_width_equals_the_hard_one(make: Make) -> None:
    hard, soft = head_of(make, "head.label_sigma=0.0"), head_of(make, "head.label_sigma=1e-3")
    tokens = torch.randint(0, 256, (2, hard.action_horizon, hard.spec.dim))
    action, logits = hard.bins.decode(tokens), torch.randn(*tokens.shape, 256)
    torch.testing.assert_close(soft._cross_entropy(logits, action), hard._cross_entropy(logits, action))


def test_hard_label_is_cross_entropy(make: Make) -> None:
    head = head_of(make, "head.label_sigma=0.0")
    action = torch.randn(2, head.action_horizon, head.spec.dim)
    logits = torch.randn(*action.shape, 256)
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 2), head.bins.encode(action).flatten())
    torch.testing.assert_close(head._cross_entropy(logits, action).mean(), wanted)


def test_soft_label_forgives_a_neighbour(make: Make) -> None:
    head = head_of(make, "head.label_sigma=1.0")
    action = head.bins.decode(torch.full((1, head.action_horizon, head.spec.dim), 100))

    def loss_of(token: int) -> float:
        logits = uniform_logits(head)[:1]
        logits[..., token] = 5
        return float(head._cross_entropy(logits, action).mean())

    assert loss_of(100) < loss_of(101) < loss_of(110)
    assert loss_of(101) == pytest.approx(loss_of(99), rel=1e-3)


def test_readouts(make: Make) -> None:
    logits = torch.full((256,), -30.0)
    logits[[10, 20]] = torch.log(torch.tensor([0.75, 0.25]))
    assert head_of(make, "head.readout=argmax")._read(logits) == 10
    assert head_of(make, "head.readout=expected")._read(logits) == pytest.approx(12.5, abs=1e-3)


@pytest.mark.parametrize("decoding", ["parallel", "autoregressive"])
@pytest.mark.parametrize("readout", ["expected", "argmax"])
def test_one_step_lowers_the_loss(make: Make, load_batch: LoadBatch, decoding: str, readout: str) -> None:
    parts = make("head=discrete_token", f"head.decoding={decoding}", f"head.readout={readout}")
    head, batch = parts.head, load_batch(parts, [0, 20, 40, 60])
    optimizer = torch.optim.SGD(head.parameters(), lr=1e-2)
    before, _ = head.compute_loss(batch)
    before.backward()
    optimizer.step()
    assert head.compute_loss(batch)[0] < before
    assert head.eval().predict_action(batch.observation).action.isfinite().all()


def test_teacher_forced_logits_equal_step_by_step(make: Make, load_batch: LoadBatch) -> None:
    parts = make("head=discrete_token", AUTOREGRESSIVE, "head.readout=argmax")
    head, batch = parts.head.eval(), load_batch(parts, [0, 20, 40])
    with torch.inference_mode():
        prefix = head.prefix(batch.observation)
        own = head._generate(prefix)
        forced = head._forced_logits(prefix, own)  # forced to what it said itself, it must say it again
    assert torch.equal(head.bins.encode(own), forced.argmax(-1))


def test_a_token_depends_on_those_before_it_alone(make: Make, load_batch: LoadBatch) -> None:
    parts = make("head=discrete_token", AUTOREGRESSIVE)
    head, batch = parts.head.eval(), load_batch(parts, [0, 20, 40])
    action = head.action_norm.normalize(batch.action)
    other = action.clone()
    other[:, 2, 3] += 1
    place = 2 * head.spec.dim + 3
    with torch.inference_mode():
        prefix = head.prefix(batch.observation)
        one, two = (head._forced_logits(prefix, a).flatten(1, 2) for a in (action, other))
    torch.testing.assert_close(one[:, : place + 1], two[:, : place + 1])
    assert not torch.allclose(one[:, place + 1 :], two[:, place + 1 :])
