"""`trainer.strategy=fsdp`: a base shared out over the ranks, and data parallelism for what trains.

The linear layers of the repeated blocks that rest, nearly all weights of a large model, lie in equal parts on the ranks
(PyTorch's FSDP2, `fully_shard`; after ZeRO-3, Rajbhandari et al. 2020, arXiv 1910.02054); each is gathered while it
runs and dropped again. Adapters, head and the rest of the base are whole on every rank, as in DDP, which averages their
gradients: they are small, and so policy folders, checkpoints and optimizers are those of any other training.
"""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from vlaexp.errors import UserError
from vlaexp.lora import INSIDE_A_BLOCK, free_standing_layers
from vlaexp.model.quantize import is_quantized

FSDP = "fsdp"
# Some adapters get no gradient (`vlaexp.ledger.dead_adapters`). Ranks are not synchronized at the start, which would
# copy the base: weights and seed make them alike.
DDP: dict[str, Any] = {"find_unused_parameters": True, "init_sync": False}


class ShardedBase(DDPStrategy):
    """DDP with the weights of `layers` shared out, so that every pass through them takes all ranks.

    Args:
        layers: of the module that will be trained (`layers_to_shard`).
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__(**DDP)
        self._layers = layers

    def model_to_device(self) -> None:
        """Layer by layer, so that the whole base never lies on one device."""
        assert self.model is not None
        shard(self.model, self._layers, init_device_mesh(self.root_device.type, (self.world_size,)))
        super().model_to_device()


def shard(module: nn.Module, layers: Sequence[nn.Linear], mesh: DeviceMesh) -> None:
    """Share out the weights of `layers` over the processes of `mesh`, in place, and move them to its devices.

    Args:
        module: holds the layers; what it has besides stays as it is.
        layers: each is to be run by calling it.
        mesh: of one dimension.
    """
    shared = {parameter for layer in layers for parameter in layer.parameters()}
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh, ignored_params=set(module.parameters()) - shared)  # the root, which has none


def layers_to_shard(module: nn.Module) -> list[nn.Linear]:
    """The linear layers of the repeated blocks whose weights rest.

    Raises:
        UserError: where there are none, or adapters read the weights of their layers beside running them.
    """
    if is_quantized(module):
        raise UserError(
            f"trainer.strategy={FSDP} with lora.quantize=nf4: 4-bit weights cannot be shared out; set "
            "lora.quantize=null, or trainer.strategy=ddp, where each GPU holds the base in 4 bits"
        )
    if any("lora_magnitude_vector" in name for name, _ in module.named_parameters()):
        raise UserError(
            f"trainer.strategy={FSDP} with lora.dora=true: DoRA reads the whole weight of a layer beside running it; "
            "set lora.dora=false, or trainer.strategy=ddp"
        )
    layers = [
        layer
        for name, layer in free_standing_layers(module)
        if isinstance(layer, nn.Linear)
        and INSIDE_A_BLOCK.search(name)
        and not any(parameter.requires_grad for parameter in layer.parameters())
    ]
    if not layers:
        raise UserError(
            f"trainer.strategy={FSDP} shares out the resting linear layers of repeated blocks, and here none rests; "
            "freeze more (freeze=backbone or freeze=all, with lora=rN), or set trainer.strategy=ddp"
        )
    return layers


def bytes_per_rank(layers: Sequence[nn.Linear], devices: int) -> int:
    """What the weights of `layers` take on each rank, the largest whole while it runs."""
    sizes = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in layers]
    return sum(sizes) // devices + max(sizes)
