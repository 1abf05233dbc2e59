"""Colour jitter: one draw per sample, the same for its steps and cameras, and nothing else changes."""

import pytest
import torch

from vlaexp.data_types import Observation
from vlaexp.dataset.augment import ColourJitter


@pytest.fixture
def observation():
    images = {name: torch.full((6, 2, 3, 4, 4), 100, dtype=torch.uint8) for name in ("front", "wrist")}
    return Observation(images, torch.zeros(6, 2, 5), ["go"] * 6)


def jitter(observation, seed=0, brightness=0.2, cast=15.0):
    torch.manual_seed(seed)
    return ColourJitter(brightness, cast)(observation)


def test_steps_and_cameras_of_a_sample_are_changed_alike_and_samples_differ(observation):
    images = jitter(observation).images
    assert torch.equal(images["front"], images["wrist"])
    assert torch.equal(images["front"][:, 0], images["front"][:, 1])
    assert len({tuple(sample[0, :, 0, 0].tolist()) for sample in images["front"]}) == 6


def test_brightness_scales_all_channels_and_cast_shifts_each(observation):
    scaled = jitter(observation, cast=0.0).images["front"]
    assert torch.equal(scaled[:, :, 0], scaled[:, :, 2])
    assert (scaled != 100).any()
    shifted = jitter(observation, brightness=0.0).images["front"]
    assert (shifted[:, :, 0] != shifted[:, :, 2]).any()


def test_bytes_stay_bytes_and_do_not_wrap_around(observation):
    for level in (0, 255):
        observation.images["front"].fill_(level)
        image = jitter(observation, cast=40.0).images["front"]
        assert image.dtype == torch.uint8
        assert (image.int() - level).abs().max() < 200


def test_the_torch_seed_decides(observation):
    assert torch.equal(jitter(observation, 1).images["front"], jitter(observation, 1).images["front"])
    assert not torch.equal(jitter(observation, 1).images["front"], jitter(observation, 2).images["front"])


def test_without_strength_nothing_changes_and_the_input_never_does(observation):
    same = jitter(observation, brightness=0.0, cast=0.0)
    assert torch.equal(same.images["front"], observation.images["front"])
    jitter(observation)
    assert (observation.images["front"] == 100).all()
    assert same.state is observation.state
    assert same.instruction is observation.instruction
