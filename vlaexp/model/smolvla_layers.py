"""SmolVLA's modules, built from sizes; LeRobot's own constructors ask the hub for them, and for image processors."""

import copy
from typing import Any

from jaxtyping import Bool, Float, Int
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import VLAFlowMatching
from lerobot.policies.smolvla.smolvlm_with_expert import SmolVLMWithExpertModel, get_intermediate_size
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, DynamicCache, SmolVLMForConditionalGeneration

from vlaexp.model.layers import KeysValues

WAVELENGTH = 10_000.0  # of the rotary embedding, whatever the vision-language model was trained with
SMOLVLM2_500M: dict[str, Any] = {  # config.json of HuggingFaceTB/SmolVLM2-500M-Video-Instruct
    "model_type": "smolvlm",
    "scale_factor": 4,
    "image_token_id": 49190,
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "llama",
        "vocab_size": 49280,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "pad_token_id": 2,
    },
    "vision_config": {
        "model_type": "smolvlm_vision",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 512,
        "patch_size": 16,
    },
}


class VisionLanguageExpert(SmolVLMWithExpertModel):
    """The vision-language model, cut to its first layers, and the action expert."""

    def __init__(self, policy: SmolVLAConfig, sizes: Any) -> None:
        nn.Module.__init__(self)
        text = sizes.text_config
        if policy.num_vlm_layers > 0:
            text.num_hidden_layers = policy.num_vlm_layers
        text.rope_parameters = {"rope_type": "default", "rope_theta": WAVELENGTH}
        self.config, self.attention_mode = sizes, policy.attention_mode
        self.vlm = SmolVLMForConditionalGeneration(sizes)
        self.num_vlm_layers = text.num_hidden_layers
        self.num_attention_heads, self.num_key_value_heads = text.num_attention_heads, text.num_key_value_heads
        self.self_attn_every_n_layers = policy.self_attn_every_n_layers
        own = copy.deepcopy(text)
        own.hidden_size = self.expert_hidden_size = int(text.hidden_size * policy.expert_width_multiplier)
        own.intermediate_size = get_intermediate_size(own.hidden_size)
        if policy.num_expert_layers > 0:
            own.num_hidden_layers = policy.num_expert_layers
        self.num_expert_layers = own.num_hidden_layers
        self.lm_expert = AutoModel.from_config(own)
        self.lm_expert.embed_tokens = None
        self.freeze_vision_encoder = self.train_expert_only = False
        for i, layer in enumerate(self.lm_expert.layers):
            if "cross" in self.attention_mode and (
                self.self_attn_every_n_layers <= 0 or i % self.self_attn_every_n_layers
            ):
                attention, width = layer.self_attn, text.num_key_value_heads * text.head_dim
                attention.k_proj = nn.Linear(width, width, bias=own.attention_bias)
                attention.v_proj = nn.Linear(width, width, bias=own.attention_bias)

    def run_expert(
        self,
        x: Float[Tensor, "B H E"],
        positions: Int[Tensor, "B H"],
        attend: Bool[Tensor, "B H L"],
        past: tuple[KeysValues, ...],
        checkpointing: bool,
    ) -> Float[Tensor, "B H E"]:
        """What `forward` gives of the expert after a prefix with keys and values `past`, layer by layer."""
        layers = self.get_model_layers([self.get_vlm_model().text_model, self.lm_expert])
        for i in range(self.num_vlm_layers):
            args = (layers, i, x, positions, attend, past)
            x = (
                checkpoint(self._expert_layer, *args, use_reentrant=False)  # type: ignore[assignment]
                if checkpointing
                else self._expert_layer(*args)
            )
        return self.lm_expert.norm(x)

    def _expert_layer(
        self, layers: Any, i: int, x: Tensor, positions: Tensor, attend: Tensor, past: tuple[KeysValues, ...]
    ) -> Tensor:
        if (layer := layers[1][i]) is None:  # an expert of fewer layers than the language model
            return x
        every = self.self_attn_every_n_layers
        alone = "cross" in self.attention_mode and not (every > 0 and i % every == 0)
        attention = self.forward_cross_attn_layer if alone else self.forward_attn_layer
        head_dim = layer.self_attn.head_dim
        cache = DynamicCache(past)  # grows; the tensors of `past` do not
        (seen,), _ = attention(layers, [None, x], i, positions, attend, len(x), head_dim, True, cache)
        x = layer.self_attn.o_proj(seen.to(layer.self_attn.o_proj.weight.dtype)) + x
        x = x.to(layer.post_attention_layernorm.weight.dtype)  # embedded actions are float32; LeRobot adds in place
        return x + layer.mlp(layer.post_attention_layernorm(x))


class FlowMatching(VLAFlowMatching):
    """The same with its projections."""

    def __init__(self, policy: SmolVLAConfig, sizes: Any) -> None:
        nn.Module.__init__(self)
        self.config = policy
        self.vlm_with_expert = VisionLanguageExpert(policy, sizes)
        width = self.vlm_with_expert.expert_hidden_size
        self.state_proj = nn.Linear(policy.max_state_dim, sizes.text_config.hidden_size)
        self.action_in_proj = nn.Linear(policy.max_action_dim, width)
        self.action_out_proj = nn.Linear(width, policy.max_action_dim)
        self.action_time_mlp_in = nn.Linear(2 * width, width)
        self.action_time_mlp_out = nn.Linear(width, width)
