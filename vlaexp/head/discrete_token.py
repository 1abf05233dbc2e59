"""`head=discrete_token`: each action dimension of each step as one of `bins` tokens (RT-2, arXiv 2307.15818).

Bins are uniform between two quantiles of the training actions, per step and dimension. `decoding=parallel` predicts all
tokens of a chunk at once (OpenVLA-OFT); `autoregressive` one after the other, step by step and dimension by dimension,
each seeing those before it (RT-2, OpenVLA). `label_sigma` spreads the label over neighbouring bins, so that a token
next to the right one costs less than one far away; `readout` turns the distribution into a number.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlaexp.errors import UserError
from vlaexp.head.layers import ChunkReadout
from vlaexp.head.prefix import PrefixHead
from vlaexp.model.base import Prefix

MARGIN = 0.03  # the outer bins reach this share of the quantile range further


class ActionBins(nn.Module):
    """Uniform bins per step and dimension over normalized actions; `decode(encode(a))` is within half a bin."""

    low: Tensor
    high: Tensor

    def __init__(self, low: Float[Tensor, "H A"], high: Float[Tensor, "H A"], bins: int) -> None:
        super().__init__()
        if bins < 2:
            raise UserError(f"head.bins={bins}; expected at least 2")
        width = (high - low).clamp_min(1e-3)
        self.bins = bins
        self.register_buffer("low", low - MARGIN * width, persistent=False)
        self.register_buffer("high", low + width + MARGIN * width, persistent=False)

    def position(self, action: Float[Tensor, "B H A"]) -> Float[Tensor, "B H A"]:
        """Continuous bin index in [0, bins - 1]; bin k is centred on k. Values outside the range are clipped."""
        return ((action - self.low) / (self.high - self.low)).clamp(0, 1) * (self.bins - 1)

    def encode(self, action: Float[Tensor, "B H A"]) -> Int[Tensor, "B H A"]:
        return self.position(action).round().long()

    def decode(self, position: Tensor) -> Float[Tensor, "B H A"]:
        return position / (self.bins - 1) * (self.high - self.low) + self.low


class DiscreteTokenHead(PrefixHead):
    """Classification over bins. Further arguments: `PrefixHead`.

    Args:
        bins: tokens per dimension.
        decoding: `parallel` or `autoregressive`.
        label_sigma: width in bins of the soft label; 0 gives one-hot labels.
        readout: `expected` value of the distribution, or its `argmax`.
        quantiles: the range of the bins, as two quantiles of the training actions (0.01 and 0.99 as recorded).
    """

    name = "discrete_token"
    spaces = ("ee_delta", "joint", "native")
    loss_name = "nll"

    def __init__(
        self,
        bins: int = 256,
        decoding: Literal["parallel", "autoregressive"] = "parallel",
        label_sigma: float = 0.0,
        readout: Literal["expected", "argmax"] = "argmax",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if label_sigma < 0:
            raise UserError(f"head.label_sigma={label_sigma}; expected 0 (one-hot) or a width in bins")
        self._decoding, self._sigma, self._readout_rule = decoding, label_sigma, readout
        statistics = self.norm_stats.quantities["action"]
        low, high = (
            self.action_norm.normalize(torch.as_tensor(q, dtype=torch.float32)).expand(self.action_horizon, -1)
            for q in (statistics.q01, statistics.q99)
        )
        self.bins = ActionBins(low, high, bins)
        width, dim = self.model.width, self.spec.dim
        if decoding == "parallel":
            self.readout = ChunkReadout(self.model, self.action_horizon, dim * bins)
        else:
            self.token_in = nn.Embedding(bins + 1, width)  # the last row starts the sequence
            self.position_in = nn.Parameter(torch.randn(self.action_horizon * dim, width) * 0.1)
            self.out = nn.Linear(width, bins)

    def loss(self, prefix: Prefix, action: Float[Tensor, "B H A"], valid: Float[Tensor, "B H"]) -> Tensor:
        logits = self._parallel_logits(prefix) if self._decoding == "parallel" else self._forced_logits(prefix, action)
        return self.masked_mean(self._cross_entropy(logits, action), valid)

    def predict(self, prefix: Prefix, noise: Float[Tensor, "B H A"]) -> Float[Tensor, "B H A"]:
        if self._decoding == "parallel":
            return self.bins.decode(self._read(self._parallel_logits(prefix)))
        return self._generate(prefix)

    def _cross_entropy(
        self, logits: Float[Tensor, "B H A bins"], action: Float[Tensor, "B H A"]
    ) -> Float[Tensor, "B H A"]:
        log_probabilities = logits.log_softmax(-1)
        if self._sigma == 0:
            return -log_probabilities.gather(-1, self.bins.encode(action)[..., None]).squeeze(-1)
        centres = torch.arange(self.bins.bins, device=action.device)
        offset = (centres - self.bins.position(action)[..., None]) / self._sigma
        return -((-0.5 * offset**2).softmax(-1) * log_probabilities).sum(-1)

    def _read(self, logits: Float[Tensor, "*B bins"]) -> Float[Tensor, "*B"]:
        if self._readout_rule == "argmax":
            return logits.argmax(-1).float()
        return (logits.softmax(-1) * torch.arange(self.bins.bins, device=logits.device)).sum(-1)

    def _parallel_logits(self, prefix: Prefix) -> Float[Tensor, "B H A bins"]:
        return self.readout(self.model, prefix).unflatten(-1, (self.spec.dim, self.bins.bins))

    def _forced_logits(self, prefix: Prefix, action: Float[Tensor, "B H A"]) -> Float[Tensor, "B H A bins"]:
        """Teacher forcing: the token before each position is the demonstrated one."""
        tokens = self.bins.encode(action).flatten(1)
        before = F.pad(tokens[:, :-1], (1, 0), value=self.bins.bins)
        hidden, _ = self.model.extend(prefix, self.token_in(before) + self.position_in, "causal")
        return self.out(hidden).unflatten(1, (self.action_horizon, self.spec.dim))

    def _generate(self, prefix: Prefix) -> Float[Tensor, "B H A"]:
        token = torch.full((len(prefix.hidden), 1), self.bins.bins, device=prefix.hidden.device)
        positions = []
        for i in range(self.action_horizon * self.spec.dim):
            hidden, prefix = self.model.extend(prefix, self.token_in(token) + self.position_in[i], "causal")
            logits = self.out(hidden)
            positions.append(self._read(logits))
            token = logits.argmax(-1)
        return self.bins.decode(torch.cat(positions, 1).unflatten(1, (self.action_horizon, self.spec.dim)))
