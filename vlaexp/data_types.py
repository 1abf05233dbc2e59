"""The field's words as types. Axes, said once:

    B batch   V cameras   T observation steps   H action horizon (predicted)   A action dimensions   D width
    S state dimensions   N tokens

`n_action_steps` of the H predicted actions are executed before the policy looks again. LeRobot calls H `chunk_size`,
openpi `action_horizon`. Shapes in annotations are checked at run time in the tests only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from vlaexp.action_spec import ActionSpec


@dataclass(frozen=True)
class Observation:
    """What a policy sees. Tokenizing and image preprocessing belong to the model.

    Attributes:
        images: by camera name, RGB.
        state: proprioception in physical units.
        instruction: B commands in words.
        features: by camera name, frozen vision features from a cache; a model that finds them skips its vision part.
    """

    images: dict[str, UInt8[Tensor, "B T 3 height width"]]
    state: Float[Tensor, "B T S"]
    instruction: Sequence[str]
    features: dict[str, Float[Tensor, "B N C"]] | None = None

    @property
    def batch_size(self) -> int:
        return self.state.shape[0]

    def to(self, device: torch.device | str) -> "Observation":
        return replace(
            self,
            images={name: image.to(device) for name, image in self.images.items()},
            state=self.state.to(device),
            features=None
            if self.features is None
            else {name: value.to(device) for name, value in self.features.items()},
        )


@dataclass(frozen=True)
class Batch:
    """A training sample batch: an observation and the H actions that followed it, in physical units.

    Attributes:
        observation: at the first step of the chunk.
        action: in the meaning of the dataset's ActionSpec.
        action_is_pad: True where the episode had already ended; such steps carry no loss.
        targets: further labels by name, for auxiliary losses and metrics (see `vlaexp.dataset.targets`).
    """

    observation: Observation
    action: Float[Tensor, "B H A"]
    action_is_pad: Bool[Tensor, "B H"]
    targets: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(
            self.observation.to(device),
            self.action.to(device),
            self.action_is_pad.to(device),
            {name: value.to(device) for name, value in self.targets.items()},
        )


@dataclass(frozen=True)
class ActionChunk:
    """H predicted actions in physical units, what they mean, and optionally how unfamiliar the input was."""

    action: Float[Tensor, "B H A"]
    spec: ActionSpec
    ood_score: Float[Tensor, "B"] | None = None


@runtime_checkable
class Policy(Protocol):
    """All that evaluation knows about what it evaluates.

    Each row has its own random generator, seeded by `reset`: what an episode does never depends on its neighbours in
    the batch.
    """

    n_action_steps: int
    n_obs_steps: int

    def reset(self, seeds: Sequence[int], env_ids: Sequence[int], episodes: Sequence[dict[str, Any]]) -> None:
        """Begin new episodes in the rows `env_ids`; `episodes` describes each (scene as plain data)."""
        ...

    def act(self, observation: Observation) -> ActionChunk:
        """Actions for every row of `observation`."""
        ...
