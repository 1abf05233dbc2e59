"""The diffusion transformer of RDT-1B (arXiv 2410.07864): from noised action tokens to denoised ones.

    tokens      diffusion step, control frequency, state, then H action tokens; they all see each other
    conditions  language tokens (blocks 0, 2, ...) and image tokens (blocks 1, 3, ...), by cross-attention

Names are those of the published weights. The conditions do not depend on the diffusion step, so that their keys and
values are computed once for all steps of a sampler.
"""

from functools import partial

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from jaxtyping import Bool, Float
from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from vlaexp.model.layers import KeysValues
from vlaexp.model.rdt_checkpoint import RDTConfig
from vlaexp.model.rdt_slots import SLOTS

LEADING = 3  # tokens before the actions
FREQUENCIES = 256  # numbers of a sinusoidal embedding
Gelu = partial(nn.GELU, approximate="tanh")


class RmsNorm(nn.Module):
    """x * weight / sqrt(var(x) + 1e-6), as timm had it until 1.0.12, when the published weights were trained.

    The variance is the unbiased one, from which the mean is removed; x itself is not centred. The true root mean
    square of later versions moves outputs visibly.
    """

    def __init__(self, width: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        return x * torch.rsqrt(x.var(-1, keepdim=True) + 1e-6) * self.weight


class NumberEmbedder(nn.Module):
    """A token that says a number: cosines, then sines of it at 128 frequencies, through two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, number: Float[Tensor, "B"], dtype: torch.dtype) -> Float[Tensor, "B 1 D"]:
        waves = get_timestep_embedding(number, FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        return self.mlp(waves.to(dtype))[:, None]


class CrossAttention(nn.Module):
    """Attention to a condition, with normalized queries and keys."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.q_norm, self.k_norm = RmsNorm(width // num_heads), RmsNorm(width // num_heads)
        self.proj = nn.Linear(width, width)

    def keys_values(self, condition: Float[Tensor, "B L D"]) -> KeysValues:
        keys, values = self.kv(condition).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.k_norm(keys), values

    def forward(
        self, x: Float[Tensor, "B M D"], keys_values: KeysValues, mask: Bool[Tensor, "B L"] | None
    ) -> Float[Tensor, "B M D"]:
        queries = self.q_norm(self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2))
        seen = None if mask is None else mask[:, None, None]
        out = F.scaled_dot_product_attention(queries, *keys_values, attn_mask=seen)
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward, each after a norm."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = RmsNorm(width)
        self.attn = Attention(width, num_heads, qkv_bias=True, qk_norm=True, norm_layer=RmsNorm)
        self.norm2 = RmsNorm(width)
        self.cross_attn = CrossAttention(width, num_heads)
        self.norm3 = RmsNorm(width)
        self.ffn = Mlp(width, width, act_layer=Gelu)  # type: ignore[arg-type]

    def forward(
        self, x: Float[Tensor, "B M D"], keys_values: KeysValues, mask: Bool[Tensor, "B L"] | None
    ) -> Float[Tensor, "B M D"]:
        x = x + self.attn(self.norm1(x))
        x = x + self.cross_attn(self.norm2(x), keys_values, mask)
        return x + self.ffn(self.norm3(x))


class FinalLayer(nn.Module):
    """Hidden states to the 128 slots."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_final = RmsNorm(width)
        self.ffn_final = Mlp(width, width, SLOTS, act_layer=Gelu)  # type: ignore[arg-type]

    def forward(self, x: Float[Tensor, "B H D"]) -> Float[Tensor, "B H W"]:
        return self.ffn_final(self.norm_final(x))


class DiffusionTransformer(nn.Module):
    """See the module docstring; `vlaexp.model.rdt` runs its blocks."""

    def __init__(self, config: RDTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.t_embedder, self.freq_embedder = NumberEmbedder(width), NumberEmbedder(width)
        self.x_pos_embed = _positions(LEADING + config.pred_horizon, width)
        self.lang_cond_pos_embed = _positions(config.max_lang_cond_len, width)
        self.img_cond_pos_embed = _positions(config.img_cond_len, width)
        self.blocks = nn.ModuleList(Block(width, config.num_heads) for _ in range(config.depth))
        self.final_layer = FinalLayer(width)


def _positions(length: int, width: int) -> nn.Parameter:
    return nn.Parameter(0.02 * torch.randn(1, length, width))


def adaptor(in_width: int, width: int, depth: int) -> nn.Sequential:
    """`depth` linear layers with GELUs between them: the published `mlp<depth>x_gelu`."""
    layers: list[nn.Module] = [nn.Linear(in_width, width)]
    for _ in range(depth - 1):
        layers += [Gelu(), nn.Linear(width, width)]
    return nn.Sequential(*layers)
