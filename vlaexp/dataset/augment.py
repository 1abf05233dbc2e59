"""Image augmentation for training observations; evaluation never sees it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlaexp.data_types import Observation


@dataclass(frozen=True)
class ColourJitter:
    """Random brightness and colour cast per sample, the same for all steps and cameras of an observation.

    Args:
        brightness: standard deviation of the factor on all pixels.
        cast: standard deviation of the shift per colour channel, in grey levels.
    """

    brightness: float
    cast: float

    def __call__(self, observation: Observation) -> Observation:
        count, device = observation.batch_size, observation.state.device
        factor = 1 + self.brightness * torch.randn(count, 1, 1, 1, 1, device=device)
        shift = self.cast * torch.randn(count, 1, 3, 1, 1, device=device)

        def jitter(image: Tensor) -> Tensor:
            return (image.float() * factor + shift).round().clamp(0, 255).to(torch.uint8)

        return replace(observation, images={name: jitter(image) for name, image in observation.images.items()})
