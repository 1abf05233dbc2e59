"""What the numbers of an action mean.

Kept apart from `data_types` and free of torch, so that simulator worker processes and the command line start fast.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlaexp.errors import UserError

Space = Literal["joint", "ee_delta", "native"]
Reference = Literal["absolute", "previous_command", "measured_state", "chunk_start"]


@dataclass(frozen=True)
class ActionSpec:
    """Space, names, units and conventions of an action vector of A dimensions.

    Attributes:
        space: `joint` (absolute joint targets), `ee_delta` (tool-centre motion) or `native` (whatever the dataset has).
        names: one name per dimension.
        units: one unit per dimension (`rad`, `m`, `open` for a gripper from 0 closed to 1 open, or `unknown`).
        lower, upper: bounds that an environment clips to, in those units; None where unknown.
        reference: what the numbers are relative to. `chunk_start` is the measured tool pose at the first step of the
            chunk (as in UMI, arXiv 2402.10329); `previous_command` the pose commanded one step before.
        frame: `world` or None where the space has none.
        rotation: `rotation_vector` or None.
        gripper: index of the gripper dimension, or None.
        fps: control rate in Hz at which one action is executed.
        embodiment: name of the robot, by which metrics find its kinematics.
        measured_by: index in the state vector of the measurement of each dimension (a joint's angle for its target), or
            None where the state does not hold them all.
        slot_map: for models with a fixed action vector, the slot of each dimension.
    """

    space: Space
    names: tuple[str, ...]
    units: tuple[str, ...]
    fps: float
    lower: tuple[float, ...] | None = None
    upper: tuple[float, ...] | None = None
    reference: Reference = "absolute"
    frame: str | None = None
    rotation: str | None = None
    gripper: int | None = None
    embodiment: str = "unknown"
    measured_by: tuple[int, ...] | None = None
    slot_map: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for field in ("units", "lower", "upper", "measured_by", "slot_map"):
            value = getattr(self, field)
            if value is not None and len(value) != self.dim:
                raise UserError(
                    f"ActionSpec.{field} has {len(value)} entries for {self.dim} dimensions {list(self.names)}; "
                    "give one entry per dimension"
                )

    @property
    def dim(self) -> int:
        return len(self.names)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ActionSpec":
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise UserError(f"unknown ActionSpec keys {unknown}; expected {sorted(known)}")
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
        }
        return cls(**fields)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "ActionSpec":
        return cls.from_dict(json.loads(path.read_text()))
