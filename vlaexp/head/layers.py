"""What several heads are made of: placeholder queries read out by the model, and the direct path from its plan."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlaexp.action_spec import ActionSpec
from vlaexp.dataset.normalize import Affine
from vlaexp.model.base import Prefix, PrefixModel


class ChunkReadout(nn.Module):
    """H placeholder embeddings run through the model, and a linear map from each hidden state to `out_width` numbers.

    Parallel decoding of a chunk from placeholders follows OpenVLA-OFT (arXiv 2502.19645).
    """

    def __init__(self, model: PrefixModel, action_horizon: int, out_width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(action_horizon, model.width) * 0.1)
        self.out = nn.Linear(model.width, out_width)

    def forward(
        self, model: PrefixModel, prefix: Prefix, added: Float[Tensor, "B H D"] | None = None
    ) -> Float[Tensor, "B H out"]:
        """Read out the queries, with `added` (a noised action, say) on top of them."""
        suffix = self.queries.expand(len(prefix.hidden), -1, -1)
        if added is not None:
            suffix = suffix + added
        hidden, _ = model.extend(prefix, suffix, "bidirectional")
        return self.out(hidden)


class LentReadout(nn.Module):
    """The chunk by the model's own regression decoder (`vlaexp.model.base.ChunkDecoder`); no layers of the head's."""

    def __init__(self, action_horizon: int) -> None:
        super().__init__()
        self._action_horizon = action_horizon

    def forward(self, model: PrefixModel, prefix: Prefix) -> Float[Tensor, "B H A"]:
        assert model.chunk_decoder is not None
        return model.chunk_decoder.regress(prefix, self._action_horizon)


def regressor(model: PrefixModel, action_horizon: int, action_dim: int) -> ChunkReadout | LentReadout:
    """Of normalized actions: the model's own where it has one."""
    if model.chunk_decoder is not None:
        return LentReadout(action_horizon)
    return ChunkReadout(model, action_horizon, action_dim)


class PlanSkip(nn.Module):
    """A linear path from the model's plan (normalized state, then predicted goal) to the normalized chunk.

    A pose relative to the current one is a difference of the two, which this path can express to the millimetre.
    It starts at zero or, where the state measures what the action commands, at "stay where you are", so that training
    begins from that baseline. Models without a plan get zeros.

    Args:
        model: gives the width of the plan.
        state, action: normalizations.
        spec: of the action.
        action_horizon: H.
    """

    def __init__(
        self, model: PrefixModel, state: Affine, action: Affine, spec: ActionSpec, action_horizon: int
    ) -> None:
        super().__init__()
        self.shape = (action_horizon, spec.dim)
        self.linear = nn.Linear(model.plan_width, action_horizon * spec.dim) if model.plan_width else None
        if self.linear is None:
            return
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        if spec.measured_by is not None and spec.reference == "absolute":
            measured = list(spec.measured_by)
            with torch.no_grad():
                weight = self.linear.weight.view(*self.shape, -1)
                dimensions = torch.arange(spec.dim)
                weight[:, dimensions, measured] = (state.scale[measured] / action.scale).expand(self.shape)
                offset = (state.centre[measured] - action.centre) / action.scale
                self.linear.bias.copy_(offset.expand(self.shape).flatten())

    def forward(self, prefix: Prefix) -> Float[Tensor, "B H A"]:
        if self.linear is None or prefix.plan is None:
            return prefix.hidden.new_zeros(len(prefix.hidden), *self.shape)
        return self.linear(prefix.plan).unflatten(-1, self.shape)


def sinusoid(t: Float[Tensor, "B"], width: int, longest_period: float = 4.0) -> Float[Tensor, "B width"]:
    """Sine and cosine features of a time in [0, 1], periods from 4e-3 to `longest_period` as in pi0."""
    fractions = torch.linspace(0, 1, width // 2, device=t.device)
    period = 4e-3 * (longest_period / 4e-3) ** fractions
    angle = 2 * math.pi * t[:, None] / period
    return torch.cat([angle.sin(), angle.cos()], 1)
