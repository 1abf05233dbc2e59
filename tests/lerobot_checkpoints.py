"""Tiny checkpoints of pi0 and SmolVLA in LeRobot's format, from LeRobot's own policies with seeded weights.

LeRobot hard-codes pi0's sizes and asks the hub for SmolVLA's image processors: both are replaced while `small` holds.
"""

import json
import string
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.pi0 import modeling_pi0
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi0.modeling_pi0 import PI0Policy
from lerobot.policies.smolvla import smolvlm_with_expert
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

WORDS = 300
HORIZON = 4
ACTION_DIM = 7
STATE_DIM = 8
PI0_SIDE, SMOLVLA_SIDE = 28, 64
INSTRUCTIONS = ("pick up the RED cube", "Open the drawer, please")
SMOLVLM: dict[str, Any] = {
    "model_type": "smolvlm",
    "scale_factor": 2,
    "image_token_id": 5,
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "llama",
        "vocab_size": WORDS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_theta": 100_000.0,
    },
    "vision_config": {
        "model_type": "smolvlm_vision",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SMOLVLA_SIDE,
        "patch_size": 16,
    },
}


@contextmanager
def small() -> Iterator[None]:
    """LeRobot's constructors at tiny size."""

    def sizes(variant: str) -> modeling_pi0.GemmaConfig:
        width, mlp = (32, 48) if variant == "gemma_2b" else (24, 40)
        return modeling_pi0.GemmaConfig(width, 2, mlp, num_heads=8, num_kv_heads=1, head_dim=8)

    def paligemma(config: Any) -> torch.nn.Module:
        tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        for name, value in (tower | {"projection_dim": 32}).items():
            setattr(config.vision_config, name, value)
        config.text_config.vocab_size = WORDS
        return real[0](config=config)

    def expert(config: Any) -> torch.nn.Module:
        config.vocab_size = WORDS
        return real[1](config=config)

    ids = SimpleNamespace(fake_image_token_id=1, global_image_token_id=1)
    processor = SimpleNamespace(from_pretrained=lambda *_: SimpleNamespace(tokenizer=ids))
    names = ("PaliGemmaForConditionalGenerationWithPiGemma", "PiGemmaForCausalLM")
    real = tuple(getattr(modeling_pi0, name) for name in names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_pi0, "get_gemma_config", sizes)
        patch.setattr(modeling_pi0, names[0], paligemma)
        patch.setattr(modeling_pi0, names[1], expert)
        patch.setattr(smolvlm_with_expert, "AutoProcessor", processor)
        yield


def features(side: int) -> dict[str, Any]:
    """Of a data set with one camera."""
    return {
        "input_features": {
            "observation.images.front": PolicyFeature(FeatureType.VISUAL, (3, side, side)),
            "observation.state": PolicyFeature(FeatureType.STATE, (STATE_DIM,)),
        },
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
        "chunk_size": HORIZON,
        "n_action_steps": HORIZON,
        "device": "cpu",
    }


def seed(policy: torch.nn.Module) -> None:
    """Weights of a size that lets every layer matter."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.1 * noise + (name.endswith("weight") and "lm_expert" in name))
            elif "embed" in name and "patch" not in name:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)


def pi0_policy() -> PI0Policy:
    with small():
        policy = PI0Policy(PI0Config(image_resolution=(PI0_SIDE, PI0_SIDE), **features(PI0_SIDE)))
    seed(policy)
    return policy.eval()


def smolvla_policy(vlm: Path) -> SmolVLAPolicy:
    side = (SMOLVLA_SIDE, SMOLVLA_SIDE)
    config = SmolVLAConfig(
        vlm_model_name=str(vlm), num_vlm_layers=4, resize_imgs_with_padding=side, **features(SMOLVLA_SIDE)
    )
    with small():
        policy = SmolVLAPolicy(config)
    seed(policy)
    return policy.eval()


def tokenizer(words: int = WORDS) -> Tokenizer:
    """Characters as words."""
    known = ["<pad>", "<eos>", "<bos>", "<unk>", *string.printable[:95], "\n"]
    known += [f"<word {i}>" for i in range(words - len(known))]
    made = Tokenizer(BPE({word: i for i, word in enumerate(known)}, [], unk_token="<unk>"))
    made.add_special_tokens([AddedToken(word, special=True) for word in known[:3]])
    return made


def write_vlm(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SMOLVLM))
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def write(folder: Path, policy: PI0Policy | SmolVLAPolicy, state_dim: int = STATE_DIM) -> Path:
    """Configuration, weights and processors' statistics as LeRobot 0.6 saves them."""
    folder.mkdir(parents=True, exist_ok=True)
    policy.config._save_pretrained(folder)
    tensors = {name: value.contiguous() for name, value in policy.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(statistics(state_dim), folder / "policy_preprocessor_step_5_normalizer_processor.safetensors")
    if isinstance(policy, PI0Policy):
        tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def statistics(state_dim: int = STATE_DIM) -> dict[str, torch.Tensor]:
    sizes = {"observation.state": state_dim, "action": ACTION_DIM}
    return {
        f"{name}.{statistic}": torch.arange(size) / 10 + value
        for name, size in sizes.items()
        for statistic, value in (("mean", 0.0), ("std", 1.0), ("min", -2.0), ("max", 3.0), ("q01", -1.5), ("q99", 2.5))
    }
