"""A tiny checkpoint in the published format of openvla-7b, from seeded weights, so that none has to be stored.

Nothing here needs vlaexp: the reference implementation was given the same folder and the same inputs. No Llama-2
tokenizer can be shipped, so its format is rebuilt with characters as words: 32000 entries, `<s>` 1, `</s>` 2, bytes 3
to 258, the empty word at 29871 (where Llama-2 has it too), `<PAD>` added as 32000.
"""

import json
import string
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

EMPTY = 29871
GAP = "\u2581"  # what Llama's tokenizer writes for a space
CONFIG: dict[str, Any] = {
    "architectures": ["OpenVLAForActionPrediction"],
    "model_type": "openvla",
    "vision_backbone_id": "dinosiglip-vit-so-224px",
    "llm_backbone_id": "llama2-7b-pure",
    "arch_specifier": "no-align+fused-gelu-mlp",
    "use_fused_vision_backbone": True,
    "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    "timm_model_args": [{"embed_dim": 32, "depth": 3, "num_heads": 2}, {"embed_dim": 24, "depth": 3, "num_heads": 2}],
    "timm_override_act_layers": [None, None],
    "image_sizes": [56, 56],
    "image_resize_strategy": "resize-naive",
    "hf_llm_id": "meta-llama/Llama-2-7b-hf",
    "llm_max_length": 2048,
    "pad_token_id": 32000,
    "pad_to_multiple_of": 64,
    "n_action_bins": 256,
    "text_config": {
        "model_type": "llama",
        "vocab_size": 32064,
        "pad_token_id": 32000,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "torch_dtype": "float32",
    },
}
PREPROCESSOR: dict[str, Any] = {
    "image_processor_type": "PrismaticImageProcessor",
    "use_fused_vision_backbone": True,
    "image_resize_strategy": "resize-naive",
    "input_sizes": [[3, 56, 56], [3, 56, 56]],
    "interpolations": ["bicubic", "bicubic"],
    "means": [[0.485, 0.456, 0.406], [0.5, 0.5, 0.5]],
    "stds": [[0.229, 0.224, 0.225], [0.5, 0.5, 0.5]],
}
NORM_STATS: dict[str, Any] = {
    name: {
        "action": {
            "mean": [0.0] * 7,
            "std": [0.1] * 7,
            "min": [-2.0 - i for i in range(6)] + [0.0],
            "max": [2.0 + i for i in range(6)] + [1.0],
            "q01": [-0.1 * (i + 1) for i in range(6)] + [0.0],
            "q99": [0.2 * (i + 1) for i in range(6)] + [1.0],
            "mask": [True] * 6 + [False],
        },
        "num_transitions": 1000,
        "num_trajectories": 10,
    }
    for name in ("bridge_orig", "libero_spatial")
}


def tensor(name: str, shape: Sequence[int]) -> np.ndarray:
    """The weight of this name; RandomState's stream is frozen, so it is the same in every version of NumPy."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).randn(*shape).astype(np.float32)
    if name.endswith("scale_factor"):
        return 0.5 + 0.1 * noise
    if len(shape) == 1:
        return 0.1 * noise + (name.endswith("weight") and "norm" in name)
    if any(word in name for word in ("pos_embed", "_token", "latent", "embed_tokens")):
        return 0.5 * noise
    noise /= float(np.sqrt(np.prod(shape[1:])))
    if name.endswith("lm_head.weight"):
        noise[31744:32000] *= 3  # so that a greedy decoder says action tokens
    return noise


def tokenizer(vocabulary: int = 32000) -> dict[str, Any]:
    """tokenizer.json of the format of Llama's."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    characters = [GAP, *string.ascii_lowercase, *string.ascii_uppercase, *string.digits, *":?,.!'-", "\n"]
    words |= {character: EMPTY + i for i, character in enumerate(characters)}
    taken = set(words.values())
    words |= {f"<word {i}>": i for i in range(vocabulary) if i not in taken}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    names = {0: "<unk>", 1: "<s>", 2: "</s>", vocabulary: "<PAD>"}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **special} for i, name in names.items()],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": GAP},
                {"type": "Replace", "pattern": {"String": " "}, "content": GAP},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, bos, second],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": GAP}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": words,
            "merges": [],
        },
    }


def recorded() -> Mapping[str, np.ndarray]:
    """What the reference implementation gave; tests/model/test_openvla.py says how."""
    return np.load(Path(__file__).with_name("openvla_golden.npz"))


def write(folder: Path, shapes: Mapping[str, Sequence[int]] | None = None, shards: int = 2) -> Path:
    """Write the checkpoint; weights in `shards` files with an index, or one file without.

    `shapes` are those of the reference's own state dict, which is recorded.
    """
    shapes = json.loads(str(recorded()["shapes"])) if shapes is None else shapes
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, Any] = {
        "config.json": CONFIG | {"norm_stats": NORM_STATS},
        "preprocessor_config.json": PREPROCESSOR,
        "tokenizer.json": tokenizer(),
        "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "pad_token": "<PAD>", "legacy": False},
    }
    tensors = {name: tensor(name, shape) for name, shape in shapes.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        place = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(tensors)}
        for file in set(place.values()):
            save_file({name: tensors[name] for name in tensors if place[name] == file}, folder / file)
        size = sum(value.nbytes for value in tensors.values())
        files["model.safetensors.index.json"] = {"metadata": {"total_size": size}, "weight_map": place}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def images(count: int = 2, height: int = 48, width: int = 80) -> np.ndarray:
    """Noise, (count, height, width, 3) uint8."""
    return np.random.RandomState(5).randint(0, 256, (count, height, width, 3)).astype(np.uint8)


INSTRUCTIONS = ("pick up the RED cube", "Open the drawer")
ACTIONS = np.random.RandomState(6).uniform(-1.1, 1.1, (2, 7)).astype(np.float32)  # normalized
