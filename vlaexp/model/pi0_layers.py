"""pi0's modules at sizes of one's own; LeRobot's constructors know those of the published model alone."""

from collections.abc import Mapping
from typing import Any

from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi0.modeling_pi0 import PI0Pytorch
from lerobot.policies.pi_gemma import PaliGemmaForConditionalGenerationWithPiGemma, PiGemmaForCausalLM
from torch import nn
from transformers import GemmaConfig, PaliGemmaConfig

Sizes = Mapping[str, Any]
ACTIVATION = "gelu_pytorch_tanh"


class VisionLanguageExpert(nn.Module):
    """PaliGemma and the action expert, under LeRobot's names."""

    def __init__(self, vision: Sizes, language: Sizes, expert: Sizes) -> None:
        super().__init__()
        width = language["hidden_size"]
        tower = {"model_type": "siglip_vision_model", "vision_use_head": False, "projection_dim": width, **vision}
        text = {"model_type": "gemma", "hidden_activation": ACTIVATION, **language}
        whole = {"vision_config": tower, "text_config": text, "projection_dim": width}
        self.paligemma = PaliGemmaForConditionalGenerationWithPiGemma(PaliGemmaConfig(**whole))
        self.gemma_expert = PiGemmaForCausalLM(GemmaConfig(**{"hidden_activation": ACTIVATION, **expert}))
        setattr(self.gemma_expert.model, "embed_tokens", None)  # noqa: B010 - actions are no words; its type says Tensor


class FlowMatching(PI0Pytorch):
    """The same with its projections.

    Args:
        config: LeRobot's.
        vision: arguments of transformers' SiglipVisionConfig, but for the size of images.
        language, expert: arguments of transformers' GemmaConfig; both have the same number and size of layers' keys.
    """

    def __init__(self, config: PI0Config, vision: Sizes, language: Sizes, expert: Sizes) -> None:
        nn.Module.__init__(self)
        self.config, self.gradient_checkpointing_enabled = config, False
        vision = {**vision, "image_size": config.image_resolution[0]}
        self.paligemma_with_expert = VisionLanguageExpert(vision, language, expert)
        width = expert["hidden_size"]
        self.action_in_proj = nn.Linear(config.max_action_dim, width)
        self.action_out_proj = nn.Linear(width, config.max_action_dim)
        self.state_proj = nn.Linear(config.max_state_dim, width)
        self.action_time_mlp_in = nn.Linear(2 * width, width)
        self.action_time_mlp_out = nn.Linear(width, width)
