"""Training steps without data: on made-up observations, to find what a step keeps in memory and what it reaches.

Works on real devices and on the meta device, where tensors have shapes but no numbers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlaexp.data_types import Batch, Observation
from vlaexp.head.base import Head, OptimizerFactory
from vlaexp.ledger import dead_adapters

IMAGE_SIZE = 224  # pixels; models resize to their own size
INSTRUCTIONS = ("pick up the red cube", "put the block in the box and close the drawer")


def made_up_batch(head: Head, batch_size: int, seed: int = 0) -> Batch:
    """Random images, and states, actions and goals as the norm stats have them, on the head's device."""
    device = next(head.parameters()).device
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch_size, *shape, generator=generator).to(device)

    pixels = (batch_size, head.n_obs_steps, 3, IMAGE_SIZE, IMAGE_SIZE)
    images = {
        camera: torch.randint(0, 256, pixels, generator=generator, dtype=torch.uint8) for camera in head.model.cameras
    }
    state = head.state_norm.unnormalize(normal(head.n_obs_steps, head.state_norm.centre.shape[-1]))
    words = [INSTRUCTIONS[i % len(INSTRUCTIONS)] for i in range(batch_size)]
    goal = head.goal_norm
    return Batch(
        observation=Observation(images, state, words).to(device),
        action=head.action_norm.unnormalize(normal(head.action_horizon, head.spec.dim)),
        action_is_pad=torch.zeros(batch_size, head.action_horizon, dtype=torch.bool, device=device),
        targets={} if goal is None else {"goal": goal.unnormalize(normal(goal.centre.shape[-1]))},
    )


def training_loss(head: Head, batch: Batch, precision: str = "32-true") -> Tensor:
    """The loss of a training step; the same number at every call."""
    device = batch.action.device
    mixed = precision.endswith("-mixed") and device.type != "meta"
    dtype = torch.float16 if precision.startswith("16") else torch.bfloat16
    was_training = head.training
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.autocast("cpu" if device.type == "meta" else device.type, dtype, enabled=mixed),
    ):
        torch.manual_seed(0)
        loss, _ = head.train().compute_loss(batch)
    head.train(was_training)
    return loss


def find_dead_adapters(head: Head, precision: str = "32-true") -> list[str]:
    """`dead_adapters` of a head's model, on two made-up observations."""
    batch = made_up_batch(head, 2)

    def actions() -> Tensor:
        was_training = head.training
        action = head.eval().predict_action(batch.observation).action
        head.train(was_training)
        return action

    return dead_adapters(head.model, lambda: training_loss(head, batch, precision), actions)


def activation_bytes(head: Head, batch_size: int, precision: str = "32-true") -> int:
    """Bytes that the forward pass of one training step keeps for the backward pass.

    The storages of all tensors that autograd saves, each counted once, without weights and buffers. Under mixed
    precision what is float32 is counted at two bytes per number. Not in it: what gradient checkpointing holds besides,
    and temporary buffers.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*head.parameters(), *head.buffers())}
    kept: dict[int, tuple[Any, float]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            share = 0.5 if precision.endswith("-mixed") and tensor.dtype == torch.float32 else 1.0
            kept[storage._cdata] = storage, share * storage.nbytes()  # held, so that its address stays its own
        return tensor

    batch = made_up_batch(head, batch_size)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        training_loss(head, batch)
    return round(sum(size for _, size in kept.values()))


def optimizer_bytes_per_weight_byte(optimizer: OptimizerFactory) -> float:
    """Bytes of optimizer state for each byte of trained weights, from one step on a small parameter (AdamW: 2)."""
    parameter = nn.Parameter(torch.zeros(1024))
    parameter.grad = torch.zeros(1024)
    made = optimizer([{"params": [parameter]}])
    made.step()
    state = [value for value in made.state[parameter].values() if isinstance(value, Tensor) and value.numel() > 1]
    return bytes_of(state) / bytes_of([parameter])


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Memory of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
