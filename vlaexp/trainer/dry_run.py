"""Training steps without data: on made-up observations, to find what a step keeps in memory and what it reaches.

Works on real devices and on the meta device, where tensors have shapes but no numbers.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from vlaexp.data_types import Batch, Observation
from vlaexp.head.base import Head, OptimizerFactory
from vlaexp.ledger import dead_adapters
from vlaexp.model.quantize import statistics

IMAGE_SIZE = 224  # pixels; models resize to their own size


def made_up_batch(head: Head, batch_size: int, seed: int = 0) -> Batch:
    """Random images, and states, actions and goals as the norm stats have them, on the head's device."""
    device = next(head.parameters()).device
    generator = torch.Generator().manual_seed(seed)

    def normal(quantity: str, *steps: int) -> Tensor:
        affine = head.norm_stats.affine(quantity)
        return affine.unnormalize(torch.randn(batch_size, *steps, affine.centre.shape[-1], generator=generator))

    pixels = (batch_size, head.n_obs_steps, 3, IMAGE_SIZE, IMAGE_SIZE)
    images = {
        camera: torch.randint(0, 256, pixels, generator=generator, dtype=torch.uint8) for camera in head.model.cameras
    }
    known = head.model.sample_instructions
    words = [known[i % len(known)] for i in range(batch_size)]
    action = normal("action", head.action_horizon)
    is_pad = torch.zeros(batch_size, head.action_horizon, dtype=torch.bool)
    targets = {"goal": normal("goal")} if "goal" in head.norm_stats.quantities else {}
    if steps := len(head.model.label_steps):
        chosen = torch.arange(steps).clamp(max=head.action_horizon - 1)
        targets |= {"label": action[:, chosen], "label_is_pad": is_pad[:, chosen]}
    return Batch(Observation(images, normal("state", head.n_obs_steps), words), action, is_pad, targets).to(device)


class MetaAutocast(TorchFunctionMode):
    """Autocast for the meta device, which torch has none for: products run in `dtype`."""

    PRODUCTS = (
        F.linear,
        F.conv2d,
        F.scaled_dot_product_attention,
        torch.matmul,
        Tensor.matmul,
        Tensor.__matmul__,
        torch.bmm,
    )

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.PRODUCTS:
            args, kwargs = tree_map(self._cast, (args, kwargs))
        return func(*args, **(kwargs or {}))

    def _cast(self, value: Any) -> Any:
        return value.to(self._dtype) if isinstance(value, Tensor) and value.dtype == torch.float32 else value


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """What Lightning puts around a training step under this `trainer.precision`."""
    if not precision.endswith("-mixed"):
        return nullcontext()
    dtype = torch.float16 if precision.startswith("16") else torch.bfloat16
    return MetaAutocast(dtype) if device.type == "meta" else torch.autocast(device.type, dtype)


def training_loss(head: Head, batch: Batch, precision: str = "32-true") -> Tensor:
    """The loss of a training step; the same number at every call."""
    device = batch.action.device
    rng_devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=rng_devices), autocast(device, precision), _undisturbed(head):
        torch.manual_seed(0)
        loss, _ = head.train().compute_loss(batch)
    return loss


@contextmanager
def _undisturbed(head: Head) -> Iterator[None]:
    """Give every module its mode back, a frozen one's may differ from the head's, and what its buffers have learned."""
    modes = {module: module.training for module in head.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in head.buffers() if not buffer.is_inference()]
    yield
    for module, training in modes.items():
        module.training = training
    for buffer, value in buffers:
        buffer.data.copy_(value)  # past autograd, whose graph may hold it


def find_dead_adapters(head: Head, precision: str = "32-true") -> list[str]:
    """`dead_adapters` of a head's model, on two made-up observations."""
    batch = made_up_batch(head, 2)

    def actions() -> Tensor:
        with _undisturbed(head):
            return head.eval().predict_action(batch.observation).action

    return dead_adapters(head.model, lambda: training_loss(head, batch, precision), actions)


def activation_bytes(head: Head, batch_size: int, precision: str = "32-true") -> int:
    """Bytes that the forward pass of one training step keeps for the backward pass.

    Of all that was made in it, what lives when the loss is known: tensors that autograd saved, and inputs of blocks
    that gradient checkpointing will run again. Not in it: temporary buffers, and such a block while it runs again.
    """
    batch = made_up_batch(head, batch_size)
    with MadeStorages() as made:
        loss = training_loss(head, batch, precision)
    return made.living_bytes(besides=loss)


class MadeStorages(TorchDispatchMode):
    """Remembers, without holding them, the storages of all tensors that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, weakref.ref[torch.UntypedStorage]] = {}  # by address, which may be used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}  # views and what is changed in place
        for storage in _storages(result):
            if storage._cdata not in given:
                self._made[storage._cdata] = weakref.ref(storage)
        return result

    def living_bytes(self, besides: Tensor) -> int:
        """Memory of those that something still holds, without that of one tensor."""
        living = (storage for reference in self._made.values() if (storage := reference()) is not None)
        return sum(storage.nbytes() for storage in living) - besides.untyped_storage().nbytes()


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def optimizer_bytes_per_weight_byte(optimizer: OptimizerFactory) -> float:
    """Bytes of optimizer state for each byte of trained weights, from one step on a small parameter (AdamW: 2)."""
    parameter = nn.Parameter(torch.zeros(1024))
    parameter.grad = torch.zeros(1024)
    made = optimizer([{"params": [parameter]}])
    made.step()
    state = [value for value in made.state[parameter].values() if isinstance(value, Tensor) and value.numel() > 1]
    return bytes_of(state) / bytes_of([parameter])


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Memory of tensors, with what 4-bit ones keep beside them."""
    every = [*tensors, *(own for tensor in tensors for own in statistics(tensor))]
    return sum(tensor.numel() * tensor.element_size() for tensor in every)
