"""Image augmentation for training observations; evaluation never sees it."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
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


def crop_and_resize(images: UInt8[Tensor, "n 3 h w"], boxes: Float[Tensor, "n 3"]) -> UInt8[Tensor, "n 3 h w"]:
    """Square crops brought back to the images' size, bilinear without antialias, corners on corners.

    The kernel of TensorFlow's `crop_and_resize` between its conversions from and to uint8, which is what OpenVLA was
    trained and evaluated with.

    Args:
        images: RGB.
        boxes: top, left and side of each crop, as shares of the image.
    """
    height, width = images.shape[-2:]
    top, left, side = (boxes[:, i, None] for i in range(3))
    y = top + side * torch.linspace(0, 1, height, device=images.device)
    x = left + side * torch.linspace(0, 1, width, device=images.device)
    grid = torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], -1) * 2 - 1
    cropped = F.grid_sample(images.float() / 255, grid, mode="bilinear", align_corners=True)
    return (cropped.clamp(0, 1) * 255.5).floor().clamp_max(255).to(torch.uint8)


def central_crop(images: UInt8[Tensor, "n 3 h w"], area: float = 0.9) -> UInt8[Tensor, "n 3 h w"]:
    """The central share `area` of each image, at the image's size."""
    side = area**0.5
    box = torch.tensor([(1 - side) / 2, (1 - side) / 2, side], device=images.device)
    return crop_and_resize(images, box.expand(len(images), -1))
