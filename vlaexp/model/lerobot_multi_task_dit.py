"""LeRobot's multi_task_dit: a diffusion transformer that reads CLIP's features of images and instruction.

After the multi-task diffusion policies of TRI (arXiv 2507.05331), by denoising or, with `objective: flow_matching`, by
flow matching. Here it keeps no store of past observations: a batch has the observed steps along its time axis.

    text encoder    rests, as in LeRobot, which runs it without gradients, and carries no adapters; its projection
                    trains.
    image encoder   learns at `vision_encoder_lr_multiplier` times the learning rate; adapters on it at the adapters'.
    CLIP            a hub id or a local folder whose path says `clip` (LeRobot asks for that), under both
                    `vision_encoder_name` and `text_encoder_name`. Policy folders hold the name of it, neither its
                    resting weights nor its tokenizer, and merged ones need it too, because LeRobot's constructor does.

transformers fills up what a CLIP folder lacks with random weights or an empty vocabulary; here that is an error.
"""

from typing import Any

import torch
from lerobot.policies.multi_task_dit.configuration_multi_task_dit import MultiTaskDiTConfig
from lerobot.policies.multi_task_dit.modeling_multi_task_dit import MultiTaskDiTPolicy
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModel, CLIPVisionModel

from vlaexp.errors import UserError
from vlaexp.model.base import OwnTraining

IMAGE_ENCODER = "observation_encoder.vision_encoder"  # or, one for each camera, `...encoders`
TEXT_ENCODER = "observation_encoder.text_encoder.text_encoder."


class StatelessMultiTaskDiT(MultiTaskDiTPolicy):
    """LeRobot's policy without a memory of its own.

    Raises:
        UserError: where the CLIP or its tokenizer is incomplete, or reads images of another size than it would get.
    """

    config: MultiTaskDiTConfig

    def __init__(self, config: MultiTaskDiTConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        text = _checked(CLIPTextModel, "text_encoder_name", config.text_encoder_name)
        _check_tokenizer(config.text_encoder_name, text.vocab_size)
        if sizes := [feature.shape[1:] for feature in config.image_features.values()]:  # all the same, says LeRobot
            _check_size(config, sizes[0])

    @property
    def own_training(self) -> tuple[OwnTraining, ...]:
        return (
            OwnTraining(TEXT_ENCODER),
            OwnTraining(IMAGE_ENCODER, lr_ratio=self.config.vision_encoder_lr_multiplier, settled=False),
        )

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Any]) -> Tensor:
        """Chunks (B, n_action_steps, A) for the observed steps in `batch`, of which LeRobot would keep a queue."""
        return self._generate_actions(self._prepare_batch(batch))


def _checked(encoder: Any, key: str, name: str) -> Any:
    """The configuration of a CLIP's encoder, whose weights are all there."""
    made, report = encoder.from_pretrained(name, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"the CLIP model.settings.{key}={name} lacks {len(missing)} tensors, such as {missing[0]}, which would be "
            "left random; name one with image and text encoder, or download it again"
        )
    return made.config


def _check_size(config: MultiTaskDiTConfig, given: tuple[int, ...]) -> None:
    side = _checked(CLIPVisionModel, "vision_encoder_name", config.vision_encoder_name).image_size
    height, width = config.image_crop_shape or config.image_resize_shape or given
    if (height, width) != (side, side):
        raise UserError(
            f"images of {height}x{width} would reach the CLIP model.settings.vision_encoder_name="
            f"{config.vision_encoder_name}, which reads {side}x{side}; set model.image_size=[{side},{side}] and "
            f"'model.settings={{image_crop_shape: [{side}, {side}]}}'"
        )


def _check_tokenizer(name: str, known: int) -> None:
    words = len(AutoTokenizer.from_pretrained(name))
    if words != known:
        raise UserError(
            f"the tokenizer of model.settings.text_encoder_name={name} knows {words} tokens, its text encoder {known}; "
            "copy tokenizer.json and tokenizer_config.json beside its weights, or download all of it again"
        )
