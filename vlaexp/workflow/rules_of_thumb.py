"""Rules of thumb for planning: which GPU holds how much, and how many demonstrations a transfer usually takes."""

from dataclasses import dataclass
from typing import Any

from vlaexp.errors import UserError, nearest

CONTEXT_GIB, FRAGMENTATION = 1.0, 1.1  # what CUDA itself takes, and the allocator's gaps


@dataclass(frozen=True)
class Gpu:
    """A device by what its driver calls it, and its memory in GiB."""

    name: str
    memory_gib: int

    def verdict(self, total_gib: float) -> dict[str, Any]:
        """Whether a training of `total_gib` fits, with room for CUDA's context and the allocator's gaps."""
        needed = FRAGMENTATION * total_gib + CONTEXT_GIB
        return {
            "gpu": self.name,
            "memory_gib": self.memory_gib,
            "needed_gib": needed,
            "fits": needed <= self.memory_gib,
        }


@dataclass(frozen=True)
class Usual:
    """How many demonstrations a kind of transfer usually takes; `most` is None where there is no upper end."""

    transfer: str
    least: int
    most: int | None

    def beside(self, at_hand: int | None) -> dict[str, Any]:
        """What there is beside what is needed."""
        enough = None if at_hand is None else at_hand >= self.least
        return {"at_hand": at_hand, "transfer": self.transfer, "usual": [self.least, self.most], "enough": enough}


GPUS = {
    "t4": Gpu("T4", 16),
    "rtx3060": Gpu("RTX 3060", 12),
    "rtx3090": Gpu("RTX 3090", 24),
    "rtx4080": Gpu("RTX 4080", 16),
    "rtx4090": Gpu("RTX 4090", 24),
    "rtx5090": Gpu("RTX 5090", 32),
    "rtx6000_ada": Gpu("RTX 6000 Ada", 48),
    "l4": Gpu("L4", 24),
    "l40s": Gpu("L40S", 48),
    "v100": Gpu("V100", 32),
    "a10": Gpu("A10", 24),
    "a40": Gpu("A40", 48),
    "a100_40gb": Gpu("A100-SXM4-40GB", 40),
    "a100_80gb": Gpu("A100-SXM4-80GB", 80),
    "h100": Gpu("H100", 80),
    "h200": Gpu("H200", 141),
    "b200": Gpu("B200", 192),
}
DEMONSTRATIONS = {  # by distance from what the base knows
    "same_task": Usual("the same robot and task", 50, 100),
    "new_task": Usual("the same robot, another task", 100, 300),
    "new_arm": Usual("another robot arm", 200, 500),
    "new_embodiment": Usual("another embodiment", 1000, None),
}


def find_gpu(name: str) -> Gpu:
    """The GPU of `gpu=name`."""
    if name not in GPUS:
        raise UserError(f"unknown gpu={name}; {nearest(str(name), GPUS)}; or leave it out and read the total")
    return GPUS[name]


def usual_demonstrations(transfer: str) -> Usual:
    """The rule for `transfer=`."""
    if transfer not in DEMONSTRATIONS:
        raise UserError(f"unknown transfer={transfer}; {nearest(str(transfer), DEMONSTRATIONS)}")
    return DEMONSTRATIONS[transfer]
