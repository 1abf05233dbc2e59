"""A tiny CLIP in the published format: config.json, model.safetensors and the files of its tokenizer."""

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

SIDE = 32
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def write(folder: Path) -> Path:
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[]).save_pretrained(folder)
    start, end = len(words) - 2, len(words) - 1
    text = SIZES | {"vocab_size": len(words), "bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    vision = SIZES | {"image_size": SIDE, "patch_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)  # so that every layer matters
    model.save_pretrained(folder)
    return folder
