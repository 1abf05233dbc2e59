import itertools
import math
from collections.abc import Callable

import pytest
import torch

from vlaexp.data_types import Batch
from vlaexp.head.flow import FlowHead
from vlaexp.head.layers import sinusoid
from vlaexp.model.base import Prefix
from vlaexp.workflow.train import Parts

Make = Callable[..., Parts]
LoadBatch = Callable[[Parts, list[int]], Batch]
Field = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture
def batch(make: Make, load_batch: LoadBatch) -> Batch:
    return load_batch(make("head=flow"), [0, 20, 40])


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(3, 6, 7, generator=torch.Generator().manual_seed(0))


def flow_head(make: Make, *overrides: str) -> FlowHead:
    head = make("head=flow", *overrides).head.eval()
    assert isinstance(head, FlowHead)
    return head


def integrate(head: FlowHead, batch: Batch, x_0: torch.Tensor, field: Field) -> torch.Tensor:
    """The head's sampler on a known velocity field instead of the network's."""

    def velocity(prefix: Prefix, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return field(x_t, t[:, None, None])

    head.velocity = velocity  # type: ignore[method-assign, assignment]
    with torch.inference_mode():
        return head.predict(head.prefix(batch.observation), x_0)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10])
def test_sampler_is_exact_on_constant_velocity(make: Make, batch: Batch, noise: torch.Tensor, num_steps: int) -> None:
    x_1 = torch.rand_like(noise)
    head = flow_head(make, f"head.num_steps={num_steps}")
    torch.testing.assert_close(integrate(head, batch, noise, lambda x, t: x_1 - noise), x_1)


def test_sampler_is_of_first_order(make: Make, batch: Batch, noise: torch.Tensor) -> None:
    errors = []
    for num_steps in (8, 16, 32):
        end = integrate(flow_head(make, f"head.num_steps={num_steps}"), batch, noise, lambda x, t: x * torch.cos(t))
        errors.append(float((end - noise * math.exp(math.sin(1))).abs().mean()))
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(1, abs=0.1)


def test_time_runs_from_noise_to_action(make: Make, batch: Batch, noise: torch.Tensor) -> None:
    times = []
    integrate(flow_head(make), batch, noise, lambda x, t: times.append(float(t[0])) or torch.zeros_like(x))
    assert times == [0, 0.25, 0.5, 0.75]


def test_velocity_of_a_right_x1_leads_there(make: Make, batch: Batch, noise: torch.Tensor) -> None:
    head, x_1 = flow_head(make), torch.rand_like(noise)
    head._network = lambda prefix, x_t, t: x_1  # type: ignore[method-assign, assignment]
    prefix = head.prefix(batch.observation)
    for time in (0.0, 0.3, 0.9):
        t = torch.full((3,), time)
        torch.testing.assert_close(head.velocity(prefix, (1 - time) * noise + time * x_1, t), x_1 - noise)
    torch.testing.assert_close(head.predict(prefix, noise), x_1)


@pytest.mark.parametrize("prediction", ["x1", "velocity"])
def test_loss_vanishes_for_the_right_network(make: Make, batch: Batch, prediction: str) -> None:
    head, x_1 = flow_head(make, f"head.prediction={prediction}"), torch.rand(3, 6, 7)

    def network(prefix: Prefix, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        action = x_1.repeat(len(t) // 3, 1, 1)
        return action if prediction == "x1" else (action - x_t) / (1 - t)[:, None, None]

    head._network = network  # type: ignore[method-assign, assignment]
    assert head.loss(head.prefix(batch.observation), x_1, torch.ones(3, 6)) < 1e-6


def test_sample_is_a_function_of_the_rows_seed_alone(make: Make, batch: Batch) -> None:
    head, samples = flow_head(make), []
    for seeds in ([1, 2, 3], [1, 7, 3]):
        head.reset(seeds, [0, 1, 2], [{}] * 3)
        torch.manual_seed(len(samples))  # the global generator plays no part
        samples.append(head.act(batch.observation).action)
    one, two = samples
    assert torch.equal(one[[0, 2]], two[[0, 2]])
    assert not torch.allclose(one[1], two[1])


def test_looking_again_draws_new_noise(make: Make, batch: Batch) -> None:
    head = flow_head(make)
    head.reset([1, 2, 3], [0, 1, 2], [{}] * 3)
    assert not torch.equal(head.act(batch.observation).action, head.act(batch.observation).action)


def test_number_of_steps_changes_the_sample(make: Make, batch: Batch, noise: torch.Tensor) -> None:
    one, four = (flow_head(make, f"head.num_steps={n}").predict_action(batch.observation, noise).action for n in (1, 4))
    assert not torch.allclose(one, four)


@pytest.mark.parametrize(("sampling", "mean"), [("uniform", 1 / 2), ("beta", 2 / 5)])
def test_times_are_drawn_as_said(make: Make, sampling: str, mean: float) -> None:
    torch.manual_seed(0)
    t = flow_head(make, f"head.time_sampling={sampling}")._sample_time(20_000, torch.device("cpu"))
    assert t.min() >= 0
    assert t.max() < 1
    assert float(t.mean()) == pytest.approx(mean, abs=0.01)


def test_samples_per_observation_share_the_prefix(make: Make, batch: Batch) -> None:
    head = flow_head(make, "head.samples_per_observation=3")
    widths = []
    head.action_in.register_forward_hook(lambda module, inputs, output: widths.append(len(output)))
    head.loss(head.prefix(batch.observation), torch.rand(3, 6, 7), torch.ones(3, 6))
    assert widths == [9]


def test_sinusoid_tells_times_apart() -> None:
    features = sinusoid(torch.linspace(0, 1, 200), 64)
    assert features.shape == (200, 64)
    distance = torch.cdist(features, features) + 100 * torch.eye(200)
    assert distance.min() > 0.1
