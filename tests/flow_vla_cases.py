"""pi0 and SmolVLA at tiny size: a published folder, LeRobot's policy and ours, for the tests of `FlowVLA`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lerobot_checkpoints as published
import torch

from vlaexp.model.flow_vla import FlowVLA
from vlaexp.model.pi0 import Pi0
from vlaexp.model.smolvla import SmolVLA

KINDS = {"pi0": Pi0, "smolvla": SmolVLA}


@dataclass(frozen=True)
class Case:
    """A published folder, LeRobot's policy, and ours."""

    name: str
    folder: Path
    theirs: Any
    ours: FlowVLA

    def make(self, **given: Any) -> FlowVLA:
        """Ours from the folder, with other arguments."""
        common: dict[str, Any] = {"cameras": ["front"], "state_dim": published.STATE_DIM, "weights": str(self.folder)}
        return KINDS[self.name](**(common | given))


@contextmanager
def written(root: Path) -> Iterator[dict[str, Case]]:
    """Both cases, their folders under `root`; LeRobot builds small policies meanwhile."""
    torch.set_num_threads(1)
    made = {}
    with published.small():
        for name, kind in KINDS.items():
            theirs = (
                published.pi0_policy() if name == "pi0" else published.smolvla_policy(published.write_vlm(root / "vlm"))
            )
            folder = published.write(root / name, theirs)
            made[name] = Case(name, folder, theirs, kind(["front"], published.STATE_DIM, weights=str(folder)).eval())
        yield made
