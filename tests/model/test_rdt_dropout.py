"""What training does to RDT's conditions: as often and as much as published, and never in evaluation."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rdt_checkpoint as published
import torch

from vlaexp.data_types import Observation
from vlaexp.dataset.normalize import NormStats, Statistics
from vlaexp.errors import UserError
from vlaexp.model.rdt import RDT
from vlaexp.model.rdt_dropout import ConditionDropout

ROWS = 20_000
Make = Callable[..., RDT]


@pytest.fixture
def make(rdt_weights: Path, tmp_path: Path) -> Make:
    given = published.arguments(rdt_weights, published.write_language(tmp_path / "language"))
    return lambda **other: RDT(**(given | other))


@pytest.fixture
def observation() -> Observation:
    pictures = torch.from_numpy(published.images()).permute(0, 1, 2, 5, 3, 4).contiguous()
    state = torch.from_numpy(published.STATE)[:, None].expand(-1, 2, -1)
    return Observation({"front": pictures[:, 0], "wrist": pictures[:, 1]}, state, published.INSTRUCTIONS)


def statistics(mean: float, std: float) -> NormStats:
    values = np.random.RandomState(0).randn(1000, 8)
    values = mean + std * (values - values.mean(0)) / values.std(0)
    return NormStats({"state": Statistics.of(values, "mean_std")}, {}, "noise")


@pytest.fixture
def dropout() -> ConditionDropout:
    torch.manual_seed(0)
    return ConditionDropout(0.1, 40.0, 8)


def test_a_tenth_of_everything_is_lost(dropout: ConditionDropout) -> None:
    tolerance = 4 * (0.1 * 0.9 / ROWS) ** 0.5  # four standard errors
    assert float((~dropout.kept(ROWS)).float().mean()) == pytest.approx(0.1, abs=tolerance)
    assert dropout.instructions(["open"] * ROWS).count("") / ROWS == pytest.approx(0.1, abs=tolerance)
    states = dropout.state(torch.full((ROWS, 8), 5.0))
    assert float((states[:, 0] == 0).float().mean()) == pytest.approx(0.1, abs=tolerance)
    assert torch.equal(states == 0, (states == 0).all(1, keepdim=True).expand_as(states)), "a state is lost as a whole"


def test_noise_has_a_hundredth_of_the_states_deviation() -> None:
    dropout = ConditionDropout(0.0, 40.0, 8)
    data = statistics(3.0, 2.0)
    for normalization, deviation in ((data.affine("state"), 0.01), (statistics(0.0, 1.0).affine("state"), 0.02)):
        dropout.read(data.quantities["state"], normalization)
        noise = dropout.state(torch.zeros(ROWS, 8))
        np.testing.assert_allclose(noise.std(0), deviation, rtol=0.05)
        np.testing.assert_allclose(noise.mean(0), 0, atol=0.001)


def test_a_lost_state_is_the_mean_one(make: Make) -> None:
    for normalize, mean in ((False, 3.0), (True, 0.0)):
        model = make(normalize=normalize)
        model.read_statistics(statistics(3.0, 2.0))
        torch.testing.assert_close(model.dropout.mean, torch.full((8,), mean))


def test_evaluation_loses_nothing(dropout: ConditionDropout) -> None:
    dropout.eval()
    state = torch.randn(ROWS, 8)
    assert dropout.kept(ROWS).all()
    assert dropout.instructions(["open"] * 100) == ["open"] * 100
    assert torch.equal(dropout.state(state), state)


def test_off_is_off(make: Make, observation: Observation) -> None:
    model = make(condition_dropout=0.0, state_noise_snr=None)
    torch.manual_seed(1)
    trained, evaluated = (mode().prefill(observation).cache for mode in (model.train, model.eval))
    assert torch.equal(trained.state, evaluated.state)
    assert all(
        torch.equal(a, b)
        for one, two in zip(trained.keys_values, evaluated.keys_values, strict=True)
        for a, b in zip(one, two, strict=True)
    )


def test_each_condition_is_lost_by_itself(make: Make, observation: Observation) -> None:
    """Over many draws everything is lost at times and kept at times, and rows don't share their fate."""
    model, seen = make(condition_dropout=0.5, state_noise_snr=None), []
    plain = model.eval().prefill(observation).cache
    for seed in range(20):
        torch.manual_seed(seed)
        given = model.train().prefill(observation).cache
        images, language = (given.keys_values[block][0] for block in (1, 0))
        lost = [
            given.slots[:, 0, 0] == 0,
            given.frequency == 0,
            (given.language_mask.sum(1) == 1),
            (images != plain.keys_values[1][0]).flatten(1).any(1),
        ]
        assert language.isfinite().all()
        seen.append(torch.stack(lost))
    share = torch.stack(seen).float().mean((0, 2))
    assert ((share > 0.2) & (share < 1.0)).all()
    rows = torch.stack(seen)
    assert (rows[..., 0] != rows[..., 1]).any(0).all()


def test_lost_images_are_the_mean_colour(make: Make, observation: Observation) -> None:
    model = make(condition_dropout=0.999, state_noise_snr=None)
    torch.manual_seed(0)
    given = model.train().prefill(observation)
    blank = {name: torch.full_like(images, 127) for name, images in observation.images.items()}
    mean_colour = model.eval().prefill(Observation(blank, observation.state, observation.instruction))
    torch.testing.assert_close(given.hidden, mean_colour.hidden, rtol=1e-4, atol=1e-4)


def test_training_is_a_function_of_the_seed(make: Make, observation: Observation) -> None:
    model = make(condition_dropout=0.5).train()
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(model.prefill(observation).cache.state)
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize("probability", [-0.1, 1.0])
def test_no_probability(probability: float) -> None:
    with pytest.raises(
        UserError, match=rf"model\.condition_dropout={probability}; expected a probability below 1, 0\.1"
    ):
        ConditionDropout(probability, None, 8)
