"""Actions as words of a language model: the last `bins` entries of its vocabulary (OpenVLA, arXiv 2406.09246).

A number in [-1, 1] falls between two of 256 uniform edges; its token counts down from the end of the vocabulary, so
that with 32000 entries -1 is 31999 and +1 is 31744. 256 edges enclose 255 intervals: +1 alone has a token of its own,
which reads as the last interval's centre, and a round trip stays within 1/255. Indices are found in float64, as NumPy
does it; in float32 edge values would fall to the other side.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlaexp.errors import UserError


class ActionTokenizer:
    """Numbers in [-1, 1] to token ids and back.

    Args:
        vocabulary: entries of the tokenizer, without those added for padding.
        bins: action tokens.
    """

    def __init__(self, vocabulary: int = 32000, bins: int = 256) -> None:
        if not 2 <= bins <= vocabulary:
            raise UserError(f"n_action_bins={bins}; expected 2 to the tokenizer's {vocabulary} entries")
        self.vocabulary, self.bins = vocabulary, bins
        self._edges = torch.from_numpy(np.linspace(-1, 1, bins))

    @property
    def first(self) -> int:
        """The smallest action id, that of +1; the largest is `vocabulary - 1`, that of -1."""
        return self.vocabulary - self.bins

    def encode(self, action: Float[Tensor, "*B"]) -> Int[Tensor, "*B"]:
        """Token ids; values beyond [-1, 1] are clipped."""
        inside = action.double().clamp(-1, 1).contiguous()
        return self.vocabulary - torch.bucketize(inside, self._edges.to(action.device), right=True)

    def decode(self, ids: Int[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Centres of the intervals, float64; ids outside the action tokens read as the nearest of them."""
        centres = ((self._edges[:-1] + self._edges[1:]) / 2).to(ids.device)
        return centres[(self.vocabulary - 1 - ids).clamp(0, self.bins - 2)]
