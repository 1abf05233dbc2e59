from collections.abc import Callable

import pytest
import torch

from vlaexp.data_types import Batch
from vlaexp.head.diffusion import DiffusionHead
from vlaexp.workflow.train import Parts

Make = Callable[..., Parts]
LoadBatch = Callable[[Parts, list[int]], Batch]


@pytest.fixture
def batch(make: Make, load_batch: LoadBatch) -> Batch:
    return load_batch(make("head=diffusion"), [0, 20, 40])


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(3, 6, 7, generator=torch.Generator().manual_seed(0))


def diffusion_head(make: Make, *overrides: str) -> DiffusionHead:
    head = make("head=diffusion", *overrides).head.eval()
    assert isinstance(head, DiffusionHead)
    return head


@pytest.mark.parametrize("num_steps", [1, 2, 5, 20])
def test_sampler_returns_a_right_prediction_exactly(
    make: Make, batch: Batch, noise: torch.Tensor, num_steps: int
) -> None:
    head, x_1 = diffusion_head(make, f"head.num_steps={num_steps}"), torch.rand_like(noise)
    head.denoise = lambda prefix, x_t, t: x_1  # type: ignore[method-assign]
    torch.testing.assert_close(head.predict(head.prefix(batch.observation), noise), x_1, rtol=0, atol=1e-6)


def test_five_steps_are_those_of_rdt(make: Make, batch: Batch, noise: torch.Tensor) -> None:
    head, steps = diffusion_head(make), []
    head.denoise = lambda prefix, x_t, t: steps.append(t.tolist()) or x_t  # type: ignore[method-assign]
    head.predict(head.prefix(batch.observation), noise)
    assert steps == [[step] * 3 for step in (999, 799, 599, 400, 200)]


def test_loss_vanishes_for_the_right_network(make: Make, batch: Batch) -> None:
    head, x_1 = diffusion_head(make), torch.rand(3, 6, 7)
    head.denoise = lambda prefix, x_t, t: x_1  # type: ignore[method-assign]
    assert head.loss(head.prefix(batch.observation), x_1, torch.ones(3, 6)) == 0


def test_noise_grows_with_the_step(make: Make) -> None:
    head, x_1, x_0 = diffusion_head(make), torch.ones(1, 1, 1), -torch.ones(1, 1, 1)
    noised = [float(head.add_noise(x_1, x_0, torch.tensor([t])).squeeze()) for t in (0, 300, 600, 999)]
    assert noised == sorted(noised, reverse=True)
    assert noised[0] == pytest.approx(1, abs=0.02)
    assert noised[-1] == pytest.approx(-1, abs=0.02)


def test_sample_is_a_function_of_the_rows_seed_alone(make: Make, batch: Batch) -> None:
    head, samples = diffusion_head(make), []
    for seeds in ([1, 2, 3], [1, 7, 3]):
        head.reset(seeds, [0, 1, 2], [{}] * 3)
        torch.manual_seed(len(samples))  # the global generator plays no part
        samples.append(head.act(batch.observation).action)
    one, two = samples
    assert torch.equal(one[[0, 2]], two[[0, 2]])
    assert not torch.allclose(one[1], two[1])
