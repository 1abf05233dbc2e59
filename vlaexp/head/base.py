"""The contract of an action head: hidden states of a base model in, an action chunk in physical units out.

A head is a LightningModule whose training, validation and optimizer steps are written once, here. A final class fills
two verbs, `loss` and `predict`, and is not subclassed further; heads vary by what is passed to them. Every head is
also a `Policy`.

All randomness of a training step is a function of (seed, global step), so that an interrupted training continues
exactly, and validation cannot disturb it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor

from vlaexp.action_spec import ActionSpec
from vlaexp.data_types import ActionChunk, Batch, Observation
from vlaexp.dataset.normalize import NormStats
from vlaexp.errors import UserError
from vlaexp.head.tool_error import tool_errors
from vlaexp.model.base import BaseModel, Prefix

OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
ScheduleFactory = Callable[..., torch.optim.lr_scheduler.LRScheduler]
Augmentation = Callable[[Observation], Observation]


class Head(L.LightningModule, ABC):
    """Base class of all heads.

    Args:
        model: the base model, already frozen and adapted as wanted.
        spec: meaning of the action that the head predicts.
        norm_stats: statistics of `state`, `action` and, with `goal_weight`, `goal`.
        action_horizon: H, predicted steps.
        n_action_steps: how many of them are executed before the policy looks again.
        optimizer, schedule: factories from the configuration.
        adapter_lr_ratio: learning rate of adapter parameters as a multiple of the head's.
        dimension_weights: one loss weight per action dimension; default 1.
        loss_weight: weight of the action loss next to the auxiliary losses.
        goal_weight: weight of the auxiliary goal loss; 0 switches it off. Needs a model with a goal prediction.
        seed: of the training randomness.
        augmentation: applied to training observations only.
    """

    name: str  # the word that the user writes, set by each final class
    spaces: tuple[str, ...]  # action spaces that the head can predict
    loss_name: str = "action_loss"  # under which the action loss is logged

    def __init__(
        self,
        *,
        model: BaseModel,
        spec: ActionSpec,
        norm_stats: NormStats,
        action_horizon: int,
        n_action_steps: int,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory,
        adapter_lr_ratio: float = 1.0,
        dimension_weights: Sequence[float] | None = None,
        loss_weight: float = 1.0,
        goal_weight: float = 0.0,
        seed: int = 0,
        augmentation: Augmentation | None = None,
    ) -> None:
        super().__init__()
        if spec.space not in self.spaces:
            raise UserError(
                f"head={self.name} predicts action space {' or '.join(self.spaces)}, not {spec.space!r}; "
                f"set action_space={self.spaces[0]} or choose another head"
            )
        if self.name not in model.supported_heads:
            raise UserError(
                f"{type(model).__name__} cannot carry head={self.name}; it carries {list(model.supported_heads)}"
            )
        if not 1 <= n_action_steps <= action_horizon:
            raise UserError(f"n_action_steps={n_action_steps}; expected 1 to action_horizon={action_horizon}")
        if dimension_weights is not None and len(dimension_weights) != spec.dim:
            raise UserError(
                f"head.dimension_weights has {len(dimension_weights)} entries; expected {spec.dim}: {list(spec.names)}"
            )
        self.model = model
        self.spec = spec
        self.norm_stats = norm_stats
        self.action_horizon = action_horizon
        self.n_action_steps = n_action_steps
        self.n_obs_steps = model.n_obs_steps
        self.seed = seed
        self._optimizer, self._schedule = optimizer, schedule
        self._adapter_lr_ratio = adapter_lr_ratio
        self._loss_weight, self._goal_weight = loss_weight, goal_weight
        self._augmentation = augmentation
        self.state_norm = norm_stats.affine("state")
        self.action_norm = norm_stats.affine("action")
        self.goal_norm = norm_stats.affine("goal") if goal_weight > 0 else None
        weights = torch.ones(spec.dim) if dimension_weights is None else torch.tensor(dimension_weights)
        self._dimension_weights: Tensor
        self.register_buffer("_dimension_weights", weights.float(), persistent=False)
        self._generators: dict[int, torch.Generator] = {}

    # ---- the two verbs of a head -------------------------------------------------------------------------------

    @abstractmethod
    def loss(self, prefix: Prefix, action: Float[Tensor, "B H A"], valid: Float[Tensor, "B H"]) -> Tensor:
        """Scalar loss of normalized actions given the observation; steps where `valid` is 0 have no gradient."""

    @abstractmethod
    def predict(self, prefix: Prefix, noise: Float[Tensor, "B H A"]) -> Float[Tensor, "B H A"]:
        """Normalized actions. `noise` is standard normal, one independent stream per row."""

    # ---- steps, written once -----------------------------------------------------------------------------------

    def prefix(self, observation: Observation) -> Prefix:
        given, expected = observation.state.shape[-1], self.state_norm.centre.shape[-1]
        if given != expected:
            raise UserError(
                f"the observation's state has {given} dimensions, this policy was trained on {expected}; "
                "give it the state column of its training data (dataset.keys), or train on this robot's"
            )
        return self.model.prefill(replace(observation, state=self.state_norm.normalize(observation.state)))

    def predict_action(self, observation: Observation, noise: Float[Tensor, "B H A"] | None = None) -> ActionChunk:
        """Actions in physical units; `noise` defaults to that of a generator seeded with 0 for every row."""
        if noise is None:
            generator = torch.Generator().manual_seed(0)
            shape = (self.action_horizon, self.spec.dim)
            noise = torch.randn(shape, generator=generator).expand(observation.batch_size, -1, -1)
        prediction = self.predict(self.prefix(observation), noise.to(observation.state.device))
        return ActionChunk(self.action_norm.unnormalize(prediction), self.spec)

    def compute_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Action loss plus auxiliary losses, and each of them by name."""
        prefix = self.prefix(batch.observation)
        valid = (~batch.action_is_pad).float()
        action_loss = self.loss(prefix, self.action_norm.normalize(batch.action), valid)
        metrics = {self.loss_name: action_loss.detach()}
        total = self._loss_weight * action_loss
        if self.goal_norm is not None:
            goal_loss = self._goal_loss(prefix, batch)
            metrics["goal_loss"] = goal_loss.detach()
            total = total + self._goal_weight * goal_loss
        return total, metrics

    def _goal_loss(self, prefix: Prefix, batch: Batch) -> Tensor:
        if prefix.goal is None or "goal" not in batch.targets:
            raise UserError(
                "head.goal_weight needs a model with a goal prediction and a dataset with tool targets; "
                "set head.goal_weight=0"
            )
        assert self.goal_norm is not None
        error = (prefix.goal - self.goal_norm.normalize(batch.targets["goal"])) ** 2
        key_poses = error[:, 3 * self.action_horizon :]
        return error.mean() + key_poses.mean()

    def masked_mean(self, error: Float[Tensor, "B H A"], valid: Float[Tensor, "B H"]) -> Tensor:
        """Mean over real steps and dimensions, with the dimension weights."""
        weighted = error * self._dimension_weights * valid[..., None]
        return weighted.sum() / (valid.sum() * self._dimension_weights.sum()).clamp_min(1.0)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        rng_devices = [self.device.index or 0] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=rng_devices):
            # 1,000,003 keeps (seed, step) pairs of small seeds apart; the rank decorrelates data-parallel workers.
            position = self.global_step * self._accumulation + batch_idx % self._accumulation
            torch.manual_seed((self.seed * 1_000_003 + position) * 64 + self.global_rank)
            if self._augmentation is not None:
                batch = replace(batch, observation=self._augmentation(batch.observation))
            loss, metrics = self.compute_loss(batch)
        self.log("train/loss", loss.detach(), batch_size=len(batch.action))
        self.log_dict({f"train/{name}": value for name, value in metrics.items()}, batch_size=len(batch.action))
        return loss

    @property
    def _accumulation(self) -> int:
        return int(self.trainer.accumulate_grad_batches)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        generator = torch.Generator().manual_seed(batch_idx)
        noise = torch.randn(batch.action.shape, generator=generator).to(batch.action.device)
        with torch.random.fork_rng(devices=[self.device.index or 0] if self.device.type == "cuda" else []):
            torch.manual_seed(batch_idx)
            loss, metrics = self.compute_loss(batch)
            chunk = self.predict_action(batch.observation, noise)
        valid = ~batch.action_is_pad
        error = (chunk.action - batch.action)[valid] ** 2
        values = {"val/loss": loss, "val/action_mse": error.mean()}
        values |= {f"val/{name}": value for name, value in metrics.items()}
        values |= {f"val/{name}": value for name, value in tool_errors(chunk, batch).items()}
        # Weighted by the number of real steps, so that the mean does not depend on how the data fall into batches.
        self.log_dict(values, batch_size=int(valid.sum()), on_step=False, on_epoch=True, sync_dist=True)

    def configure_optimizers(self) -> Any:
        adapters, others = [], []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                (adapters if "lora_" in name else others).append(parameter)
        optimizer = self._optimizer([{"params": others}])  # empty where the model's own decoder is the whole head
        if adapters:
            base_lr = optimizer.param_groups[0]["lr"]
            optimizer.add_param_group({"params": adapters, "lr": base_lr * self._adapter_lr_ratio})
        scheduler = self._schedule(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # ---- Policy ------------------------------------------------------------------------------------------------

    def reset(self, seeds: Sequence[int], env_ids: Sequence[int], episodes: Sequence[dict[str, Any]]) -> None:
        for seed, row in zip(seeds, env_ids, strict=True):
            self._generators[row] = torch.Generator().manual_seed(seed)

    @torch.inference_mode()
    def act(self, observation: Observation) -> ActionChunk:
        was_training = self.training
        self.eval()
        shape = (self.action_horizon, self.spec.dim)
        rows = [torch.randn(shape, generator=self._generators[row]) for row in range(observation.batch_size)]
        chunk = self.predict_action(observation.to(self.device), torch.stack(rows))
        self.train(was_training)
        return replace(chunk, action=chunk.action.cpu())

    # ---- what is the head's own ---------------------------------------------------------------------------------

    def own_tensors(self) -> dict[str, Tensor]:
        """Everything that training may have changed besides adapters: the head's layers and what is not frozen."""
        return {
            name: parameter.detach()
            for name, parameter in self.named_parameters()
            if "lora_" not in name and (parameter.requires_grad or not name.startswith("model."))
        }

    def decoder_tensors(self) -> dict[str, Tensor]:
        """The head's layers and the model's decoder: what a model ships for a head."""
        return {
            name: parameter.detach()
            for name, parameter in self.named_parameters()
            if name.startswith("model.decoder.") or not name.startswith("model.")
        }

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device)
