"""LeRobot's VQ-BeT (Lee et al. 2024, arXiv 2403.03181), with its two phases of training told apart by the step.

First a residual VQ-VAE learns to spell action chunks, for `n_vqvae_training_steps`; then it rests, and transformer and
heads learn to predict its codes. LeRobot counts forward passes in an attribute that no checkpoint has, validation among
them. Here the trainer says how many optimizer steps are done, which it knows after a resume, and the mark that the
codebook is complete is a buffer that lies in checkpoints and policy folders. Weights whose codebook is complete begin
with the second phase; in others the VQ-VAE trains whole in the first, whatever `freeze` and `lora` say, with LeRobot's
weight decay and ratio of learning rates.

Against LeRobot's trainer: a schedule runs on from the first phase into the second instead of beginning anew; biases and
norms of the transformer decay like the rest; on several devices the codebook follows the batches of the first. A merged
policy, run by LeRobot, executes its whole chunk, because LeRobot has no `n_action_steps` for it.
"""

import math
from typing import Any

import torch
from lerobot.policies.vqbet.configuration_vqbet import VQBeTConfig
from lerobot.policies.vqbet.modeling_vqbet import VQBeTPolicy, VqVae
from lerobot.utils.constants import OBS_IMAGES
from torch import Tensor

from vlaexp.errors import UserError
from vlaexp.model.base import OwnTraining


class TwoPhaseVQBeT(VQBeTPolicy):
    """LeRobot's policy without a memory of its own: neither for steps of training nor for past observations."""

    config: VQBeTConfig

    def __init__(self, config: VQBeTConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.vqvae.optimized_steps = -math.inf  # LeRobot's count never ends the phase  # type: ignore[assignment]

    @property
    def vqvae(self) -> VqVae:
        return self.vqbet.action_head.vqvae_model

    @property
    def discretized(self) -> bool:
        """Whether the codebook is complete."""
        return bool(self.vqvae.discretized)

    @property
    def own_training(self) -> tuple[OwnTraining, ...]:
        """The VQ-VAE's."""
        (prefix,) = (name for name, module in self.named_modules() if module is self.vqvae)
        ratio = self.config.optimizer_vqvae_lr / self.config.optimizer_lr
        return (OwnTraining(f"{prefix}.", ratio, self.config.optimizer_vqvae_weight_decay),)

    def check_steps(self, max_steps: int) -> None:
        """Refuse a training that would end before the second phase.

        Raises:
            UserError: with both numbers.
        """
        first = self.config.n_vqvae_training_steps
        if max_steps <= first and not self.discretized:
            raise UserError(
                f"trainer.max_steps={max_steps}, but the first model.settings.n_vqvae_training_steps={first} steps of "
                "model.policy=vqbet train its VQ-VAE alone, and the policy would stay random; raise trainer.max_steps "
                f"above {first}, or lower model.settings.n_vqvae_training_steps"
            )

    def reach_step(self, steps: int) -> None:
        """End the first phase once so many optimizer steps are done that it is over."""
        if steps >= self.config.n_vqvae_training_steps and not self.discretized:
            self.vqvae.get_buffer("discretized").fill_(True)
            self.vqvae.vq_layer.get_buffer("freeze_codebook").fill_(True)
            self.vqvae.eval()

    def train(self, mode: bool = True) -> "TwoPhaseVQBeT":
        super().train(mode)
        if self.discretized:
            self.vqvae.eval()
        return self

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Any]) -> Tensor:
        """Chunks (B, action_chunk_size, A) for the observed steps in `batch`, of which LeRobot would keep a queue."""
        images = torch.stack([batch[key] for key in self.config.image_features], dim=-4)
        return self.vqbet({**batch, OBS_IMAGES: images}, rollout=True)
