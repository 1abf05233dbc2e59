"""Tiny checkpoints in the published formats of rdt-1b and of its SigLIP, from seeded weights.

Nothing here needs vlaexp: the reference implementation was given the same folders and the same inputs.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

HORIZON, PATCHES, LANGUAGE_WIDTH, IMAGE_WIDTH = 6, 4, 24, 16
CONFIG: dict[str, Any] = {
    "action_dim": 128,
    "pred_horizon": HORIZON,
    "config": {
        "lang_adaptor": "mlp2x_gelu",
        "img_adaptor": "mlp2x_gelu",
        "state_adaptor": "mlp3x_gelu",
        "lang_token_dim": LANGUAGE_WIDTH,
        "img_token_dim": IMAGE_WIDTH,
        "state_token_dim": 128,
        "rdt": {"hidden_size": 32, "depth": 4, "num_heads": 4, "cond_pos_embed_type": "multimodal"},
        "noise_scheduler": {
            "type": "ddpm",
            "num_train_timesteps": 1000,
            "num_inference_timesteps": 5,
            "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "sample",
            "clip_sample": False,
        },
        "ema": {"update_after_step": 0, "inv_gamma": 1.0, "power": 0.75, "min_value": 0.0, "max_value": 0.9999},
    },
    "lang_token_dim": LANGUAGE_WIDTH,
    "img_token_dim": IMAGE_WIDTH,
    "state_token_dim": 128,
    "max_lang_cond_len": 16,
    "img_cond_len": 2 * 3 * PATCHES,
    "img_pos_embed_config": [["image", [2, 3, -PATCHES]]],
    "lang_pos_embed_config": [["lang", -16]],
}
SIGLIP: dict[str, Any] = {
    "model_type": "siglip",
    "text_config": {"model_type": "siglip_text_model"},
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": IMAGE_WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
}
INSTRUCTIONS = ("pick up the red cube", "open the drawer")
SLOTS = (0, 1, 2, 3, 4, 5, 6, 10)  # seven joints and a gripper
FPS = 20.0
STEPS = (37, 801)  # diffusion steps of the two rows


def tensor(name: str, shape: Sequence[int]) -> np.ndarray:
    """The weight of this name; RandomState's stream is frozen, so it is the same in every version of NumPy."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).randn(*shape).astype(np.float32)
    if len(shape) == 1:
        return 0.1 * noise + (name.endswith("weight") and "norm" in name)
    if "pos" in name:
        return 0.5 * noise
    return noise / float(np.sqrt(np.prod(shape[1:])))


def noise(name: str, *shape: int) -> np.ndarray:
    """Standard normal numbers of this name."""
    return np.random.RandomState(zlib.crc32(f"input {name}".encode())).randn(*shape).astype(np.float32)


def images() -> np.ndarray:
    """(rows, cameras, steps, height, width, 3) uint8; the third camera is missing."""
    return np.random.RandomState(5).randint(0, 256, (2, 2, 2, 20, 30, 3)).astype(np.uint8)


def language() -> list[np.ndarray]:
    """Embeddings of the instructions, of different lengths."""
    return [noise(f"language {i}", length, LANGUAGE_WIDTH) for i, length in enumerate((7, 5))]


def unified(values: np.ndarray) -> np.ndarray:
    """Values at their slots of the 128."""
    whole = np.zeros((*values.shape[:-1], 128), np.float32)
    whole[..., list(SLOTS)] = values
    return whole


STATE, ACTION = noise("state", 2, 8), noise("action", 2, HORIZON, 8)
NOISE = noise("noise", 2, HORIZON, 128)


def recorded() -> Mapping[str, np.ndarray]:
    """What the reference implementation gave; tests/model/test_rdt.py says how."""
    return np.load(Path(__file__).with_name("rdt_golden.npz"))


def shapes(kind: str) -> dict[str, list[int]]:
    """Of the reference's own state dict, which is recorded; `kind` is `rdt` or `siglip`."""
    return json.loads(str(recorded()[f"shapes_{kind}"]))


def weights(kind: str) -> dict[str, np.ndarray]:
    return {name: tensor(name, shape) for name, shape in shapes(kind).items()}


def write(folder: Path, pickled: bool = False) -> Path:
    """The RDT checkpoint with SigLIP in `siglip/`; as pytorch_model.bin, like the published one, or as safetensors."""
    write_siglip(folder / "siglip")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if pickled:
        import torch

        torch.save({k: torch.from_numpy(v) for k, v in weights("rdt").items()}, folder / "pytorch_model.bin")
    else:
        save_file(weights("rdt"), folder / "model.safetensors")
    return folder


def write_siglip(folder: Path) -> Path:
    """With the text tower's names, as on the hub."""
    folder.mkdir(parents=True, exist_ok=True)
    text = {"text_model.final_layer_norm.weight": np.ones(16, np.float32), "logit_scale": np.ones(1, np.float32)}
    save_file(weights("siglip") | text, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SIGLIP))
    return folder


def write_language(folder: Path, instructions: Mapping[str, np.ndarray] | None = None) -> Path:
    """A cache of embeddings, by default those of `INSTRUCTIONS`, and of the empty one, which training needs."""
    from vlaexp.model.rdt_language import embedding_file

    given = dict(zip(INSTRUCTIONS, language(), strict=True)) if instructions is None else instructions
    for instruction, embedding in {"": noise("", 1, LANGUAGE_WIDTH), **given}.items():
        path = embedding_file(folder, instruction)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"embedding": embedding}, path, metadata={"instruction": instruction})
    return folder


def arguments(weights: Path, language: Path) -> dict[str, Any]:
    """Of an `RDT` for these files."""
    return {
        "cameras": ["front", "wrist"],
        "state_dim": 8,
        "action_dim": 8,
        "action_horizon": HORIZON,
        "state_slots": SLOTS,
        "weights": str(weights),
        "language_embeddings": str(language),
        "normalize": False,
    }
