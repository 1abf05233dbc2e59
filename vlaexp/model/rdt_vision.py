"""What RDT sees: SigLIP so400m at 384 pixels (arXiv 2303.15343) by `transformers`, all patches after its last norm.

Images are padded to squares with the mean colour of SigLIP's training and resized by Pillow, as RDT's own were. The
attention pooling and the text tower of published files have no part in it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

from vlaexp.errors import UserError
from vlaexp.model.hub import read_json
from vlaexp.model.openvla_vision import resize
from vlaexp.model.rdt_checkpoint import RDTConfig
from vlaexp.model.weights import read_shards

SIGLIP = "google/siglip-so400m-patch14-384"
UNUSED = ("text_model.", "logit_scale", "logit_bias", "vision_model.head.")  # of what the published files hold
SO400M: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
MEAN_COLOUR = 127  # int(0.5 * 255)


class Vision(SiglipVisionModel):
    """SigLIP's vision tower.

    Attributes:
        image_size: side in pixels of its square images.
    """

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__(config)
        assert isinstance(config.image_size, int)
        self.image_size = config.image_size

    def patches(self, images: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n N C"]:
        """Of images that `pad_and_resize` made."""
        return self((images.float() / 127.5 - 1).to(self.dtype)).last_hidden_state

    def nothing(self) -> Float[Tensor, "1 N C"]:
        """Patches of a missing image: the mean colour."""
        shape = (1, 3, self.image_size, self.image_size)
        return self.patches(torch.full(shape, MEAN_COLOUR, dtype=torch.uint8, device=self.device))

    def renew_positions(self) -> None:
        """Fill in, after loading, the indices that are in no file."""
        embeddings = self.vision_model.embeddings
        embeddings.position_ids = torch.arange(embeddings.num_positions)[None]


def pad_and_resize(images: UInt8[Tensor, "n 3 H W"], size: int) -> UInt8[Tensor, "n 3 size size"]:
    """To a square with the image in its middle, then to `size`, bicubic with antialias."""
    height, width = images.shape[-2:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = F.pad(images, (left, side - width - left, top, side - height - top), value=MEAN_COLOUR)
    return resize(square, size)


def vision_config(folder: Path | None, rdt: RDTConfig, sizes: Mapping[str, Any] = SO400M) -> SiglipVisionConfig:
    """The tower's configuration, of a folder's weights or of `sizes`.

    Raises:
        UserError: where it is no SigLIP, or does not give the image tokens that the RDT was trained on.
    """
    given = sizes
    if folder is not None:
        whole = read_json(folder / "config.json", SIGLIP, "model.vision_weights")
        if whole.get("model_type") not in ("siglip", "siglip_vision_model"):
            raise UserError(
                f"{folder} is no SigLIP: its config.json has model_type {whole.get('model_type')!r}; set "
                f"model.vision_weights to a folder of {SIGLIP}"
            )
        given = whole.get("vision_config", whole)
    config = SiglipVisionConfig(**{key: value for key, value in given.items() if key != "model_type"})
    assert isinstance(config.image_size, int)
    assert isinstance(config.patch_size, int)
    tokens = ((config.image_size // config.patch_size) ** 2, config.hidden_size)
    if tokens != (rdt.num_patches, rdt.img_token_dim):
        source = f"in {folder}" if folder else "of model.sizes.vision"
        raise UserError(
            f"the SigLIP {source} gives {tokens[0]} tokens of width {tokens[1]} per image, this RDT was trained on "
            f"{rdt.num_patches} of width {rdt.img_token_dim}; set model.vision_weights to the one that it used"
        )
    config.vision_use_head = False
    config._attn_implementation = "sdpa"
    return config


def read_vision(folder: Path) -> dict[str, Tensor]:
    """Tensors of the vision tower."""
    return {name: tensor for name, tensor in read_shards(folder).items() if not name.startswith(UNUSED)}
