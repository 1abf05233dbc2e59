"""Images of OpenVLA (arXiv 2406.09246): what its two towers see, their patches, and the way into the language model.

DINOv2 and SigLIP read the same image under two normalizations. Each gives the patches of its second to last block,
without final norm, class token or registers; joined by channel they pass a three-layer projector. GELU is the exact one
throughout. The blocks after the one that is read stay in the module tree, because published weights hold them.
"""

import numpy as np
import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vlaexp.model.openvla_checkpoint import OpenVLAConfig


class Vision(nn.Module):
    """Patches (n, N, C) of images that `resize` made, DINOv2's channels before SigLIP's."""

    def __init__(self, config: OpenVLAConfig, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.size = config.image_sizes[0]
        self.featurizer, self.fused_featurizer = (_tower(config, i) for i in range(2))
        for tower in (self.featurizer, self.fused_featurizer):
            tower.set_grad_checkpointing(gradient_checkpointing)
        self.width = self.featurizer.embed_dim + self.fused_featurizer.embed_dim
        self._means, self._stds = config.means, config.stds

    def forward(self, images: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n N C"]:
        pixels = images.float() / 255
        patches = []
        for tower, mean, std in zip((self.featurizer, self.fused_featurizer), self._means, self._stds, strict=True):
            shift, scale = (pixels.new_tensor(values)[:, None, None] for values in (mean, std))
            seen = ((pixels - shift) / scale).to(tower.patch_embed.proj.weight.dtype)
            blocks = tower.blocks
            assert isinstance(blocks, nn.Sequential)
            patches += tower.forward_intermediates(
                seen, [len(blocks) - 2], norm=False, stop_early=True, output_fmt="NLC", intermediates_only=True
            )
        return torch.cat(patches, -1)


def _tower(config: OpenVLAConfig, index: int) -> VisionTransformer:
    tower = timm.create_model(
        config.timm_model_ids[index],
        pretrained=False,
        num_classes=0,
        img_size=config.image_sizes[index],
        act_layer=config.timm_override_act_layers[index] or "gelu",
        **config.timm_model_args[index],
    )
    assert isinstance(tower, VisionTransformer)
    return tower


class Projector(nn.Module):
    """Patches to embeddings of the language model."""

    def __init__(self, vision_width: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision_width, 4 * vision_width)
        self.fc2 = nn.Linear(4 * vision_width, width)
        self.fc3 = nn.Linear(width, width)

    def forward(self, patches: Float[Tensor, "n N C"]) -> Float[Tensor, "n N D"]:
        patches = patches.to(self.fc1.weight.dtype)  # cached features are float32 whatever the weights are
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(patches)))))


def resize(images: UInt8[Tensor, "n 3 H W"], size: int) -> UInt8[Tensor, "n 3 size size"]:
    """Resize to a square, aspect not kept, bicubic with antialias.

    By Pillow, as the published model's images were: torch's kernel differs from it by a grey level here and there.
    """
    if images.shape[-2:] == (size, size):
        return images
    if images.is_meta:
        return images.new_empty((len(images), 3, size, size))
    pixels = images.permute(0, 2, 3, 1).cpu().numpy()
    small = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)) for image in pixels]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).contiguous().to(images.device)
