"""What RDT's training does to its conditions, so that none is leaned on alone (arXiv 2410.07864; its train/dataset.py).

Each of these happens to a row with the same probability, independently: its instruction becomes the empty one, each of
its images (by frame and camera) the mean colour, its state the mean state, its control frequency 0, and the mask that
says which slots of state and action mean something becomes empty. Before that the state gets normal noise, whose
standard deviation is that of the state over 10^(SNR / 20).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vlaexp.dataset.normalize import Affine, Statistics
from vlaexp.errors import UserError


class ConditionDropout(nn.Module):
    """Does nothing in evaluation.

    Args:
        probability: of each loss.
        state_noise_snr: signal-to-noise ratio of the state in dB; None for no noise.
        state_dim: numbers of the state; their mean is 0 and their deviation 1 until `read` says otherwise.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, probability: float, state_noise_snr: float | None, state_dim: int) -> None:
        super().__init__()
        if not 0 <= probability < 1:
            raise UserError(f"model.condition_dropout={probability}; expected a probability below 1, 0.1 as published")
        self._probability = probability
        self._noise = 0.0 if state_noise_snr is None else 10 ** (-state_noise_snr / 20)
        self.register_buffer("mean", torch.zeros(state_dim), persistent=False)
        self.register_buffer("std", torch.ones(state_dim), persistent=False)

    @property
    def active(self) -> bool:
        return self.training and self._probability > 0

    @property
    def needs_empty_instruction(self) -> bool:
        return self._probability > 0

    def read(self, state: Statistics, normalization: Affine) -> None:
        """Learn mean and deviation of the training data's state, which comes in under `normalization`."""
        mean, std = (torch.as_tensor(value, dtype=torch.float32) for value in (state.mean, state.std))
        self.mean = normalization.normalize(mean).to(self.mean.device)
        self.std = (std / normalization.scale).to(self.std.device)

    def kept(self, *shape: int) -> Bool[Tensor, "..."]:
        """What is not lost."""
        if not self.active:
            return torch.ones(shape, dtype=torch.bool, device=self.mean.device)
        return torch.rand(shape, device=self.mean.device) >= self._probability

    def instructions(self, given: Sequence[str]) -> list[str]:
        if not self.active or self.mean.is_meta:  # where words are not read
            return list(given)
        return [text if kept else "" for text, kept in zip(given, self.kept(len(given)).tolist(), strict=True)]

    def state(self, given: Float[Tensor, "B S"]) -> Float[Tensor, "B S"]:
        if self.training and self._noise > 0:
            given = given + self._noise * self.std * torch.randn_like(given)
        return torch.where(self.kept(len(given), 1), given, self.mean)
