"""Files of RDT: its published format, the vision tower's, and embeddings of instructions."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rdt_checkpoint as published
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import T5Config, T5EncoderModel

from vlaexp.errors import UserError
from vlaexp.model.rdt import RDT
from vlaexp.model.rdt_language import embedding_file

Load = Callable[..., RDT]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of the test's own."""
    return published.write(tmp_path / "rdt")


@pytest.fixture
def load(folder: Path, tmp_path: Path) -> Load:
    common = {
        "cameras": ["front"],
        "state_dim": 8,
        "action_dim": 8,
        "action_horizon": 6,
        "state_slots": published.SLOTS,
    }
    common |= {"weights": str(folder), "language_embeddings": str(tmp_path / "language")}
    return lambda **given: RDT(**(common | given))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename(path: Path, old: str, new: str) -> None:
    tensors = load_file(path)
    tensors[new] = tensors.pop(old)
    save_file(tensors, path)


# ---- weights ------------------------------------------------------------------------------------------------------


def test_pickled_weights_are_those_of_safetensors(load: Load, tmp_path: Path) -> None:
    pickled = published.write(tmp_path / "pickled", pickled=True)
    assert (pickled / "pytorch_model.bin").exists()
    assert load(weights=str(pickled)).weights_fingerprint() == load().weights_fingerprint()


def test_a_pickle_that_runs_code_is_refused(load: Load, folder: Path, tmp_path: Path) -> None:
    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (folder / "model.safetensors").unlink()
    torch.save({"model.x_pos_embed": Code()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is damaged or holds more than weights"):
        load()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Code(), protocol=2))
    with pytest.raises(UserError, match="holds more than weights"):
        load()
    assert not (tmp_path / "ran").exists()


def test_weights_elsewhere_in_dtype(load: Load, folder: Path, tmp_path: Path) -> None:
    (folder / "siglip").rename(tmp_path / "eyes")
    model = load(vision_weights=str(tmp_path / "eyes"), dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_without_siglip_the_published_one_is_asked_for(load: Load, folder: Path, tmp_path: Path) -> None:
    (folder / "siglip").rename(tmp_path / "eyes")
    with pytest.raises(UserError, match=r"vision_weights=google/siglip-so400m-patch14-384.*set model\.vision_weights="):
        load()


@pytest.mark.parametrize(
    ("file", "old", "new", "text"),
    [
        (
            "model.safetensors",
            "model.blocks.1.ffn.fc1.weight",
            "model.blocks.1.ffn.fc1.weigth",
            r"missing \['model\.blocks\.1\.ffn\.fc1\.weight'\]; unknown \['.*weigth \(nearest: model\.blocks\.1\.ffn",
        ),
        (
            "siglip/model.safetensors",
            "vision_model.post_layernorm.bias",
            "a.bias",
            r"siglip do not fit.*post_layernorm",
        ),
    ],
)
def test_keys_that_do_not_fit_are_named(load: Load, folder: Path, file: str, old: str, new: str, text: str) -> None:
    rename(folder / file, old, new)
    with pytest.raises(UserError, match=text):
        load()


def test_truncated_weights_are_damaged(load: Load, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        load()


@pytest.mark.parametrize(
    ("file", "changes", "text"),
    [
        (
            "config.json",
            {"action_dim": 14},
            r"no RDT checkpoint: it has {'action_dim': 14}, expected {'action_dim': 128}",
        ),
        (
            "config.json",
            {"config": published.CONFIG["config"] | {"noise_scheduler": {"prediction_type": "epsilon"}}},
            r"'noise_scheduler\.prediction_type': 'epsilon'",
        ),
        (
            "config.json",
            {"config": published.CONFIG["config"] | {"img_adaptor": "linear"}},
            r"damaged.*'linear', expected mlp<layers>x_gelu",
        ),
        ("config.json", {"img_pos_embed_config": None}, r"config\.json is damaged"),
        (
            "config.json",
            {"pred_horizon": 7},
            r"wrong shape \['model\.x_pos_embed: file \(1, 9, 32\), model \(1, 10, 32\)",
        ),
        ("siglip/config.json", {"model_type": "clip"}, r"is no SigLIP: its config\.json has model_type 'clip'"),
        (
            "siglip/config.json",
            {"vision_config": published.SIGLIP["vision_config"] | {"image_size": 42}},
            r"gives 9 tokens of width 16 per image, this RDT was trained on 4 of width 16",
        ),
    ],
)
def test_another_architecture_is_refused(load: Load, folder: Path, file: str, changes: dict, text: str) -> None:
    edit(folder / file, **changes)
    with pytest.raises(UserError, match=text):
        load()


def test_missing_config_is_named(load: Load, folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is missing or damaged.*wants the files of robotics-diffusion"):
        load()


# ---- instructions -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny T5 encoder whose tokenizer knows five words."""
    folder = tmp_path_factory.mktemp("t5")
    words = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", "open", "close", "the", "door"))}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"})
    )
    torch.manual_seed(0)
    width = published.LANGUAGE_WIDTH
    config = T5Config(vocab_size=7, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder)
    return folder


def test_instructions_are_encoded_once_and_kept(load: Load, t5: Path, tmp_path: Path) -> None:
    texts = ["open the door", "close"]
    load(text_encoder=str(t5)).read_instructions(texts)
    model = load()  # without T5
    model.read_instructions(texts)
    assert sorted(model.sample_instructions) == ["close", "open the door"]
    tokens, mask = model.language(texts, model.decoder.x_pos_embed)
    assert mask.tolist() == [[True] * 4, [True, True, False, False]]  # the end of sentence is a token
    alone, _ = model.language(["close"], model.decoder.x_pos_embed)
    torch.testing.assert_close(tokens[1:, :2], alone)
    (path,) = (tmp_path / "language").glob("open-the-door-*.safetensors")
    embedding = load_tensors(path)["embedding"]
    ids = torch.tensor([[3, 5, 6, 1]])
    with torch.inference_mode():
        wanted = T5EncoderModel.from_pretrained(t5, dtype=torch.bfloat16).eval()(ids).last_hidden_state[0]
    assert torch.equal(embedding, wanted)


def test_unknown_instruction_says_what_to_download(load: Load, tmp_path: Path) -> None:
    text = (
        r"no language embedding of \['open the door'\] in model\.language_embeddings=.*download google/t5-v1_1-xxl "
        r"into a folder and set model\.text_encoder=FOLDER.*or copy open-the-door-\w+\.safetensors"
    )
    with pytest.raises(UserError, match=text):
        load(condition_dropout=0.0).read_instructions(["open the door"])
    text = r"no language embedding of \['', 'open the door'\] .*; model\.condition_dropout=0 needs no empty instruction"
    with pytest.raises(UserError, match=text):
        load().read_instructions(["open the door"])


@pytest.mark.parametrize(
    ("embedding", "text"),
    [
        (np.zeros((3, 7), np.float32), r"has shape \(3, 7\); expected \(tokens, 24\) with 1 to 16 tokens"),
        (np.zeros((17, 24), np.float32), r"has shape \(17, 24\)"),
        (None, r"is damaged .*remove it to encode it again"),
    ],
)
def test_embedding_that_does_not_fit_is_refused(
    load: Load, tmp_path: Path, embedding: np.ndarray | None, text: str
) -> None:
    folder = tmp_path / "language"
    if embedding is None:
        folder.mkdir()
        embedding_file(folder, "open").write_bytes(b"nothing")
    else:
        published.write_language(folder, {"open": embedding})
    with pytest.raises(UserError, match=text):
        load(condition_dropout=0.0).read_instructions(["open"])


def test_a_folder_that_is_no_t5_is_refused(load: Load, t5: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.text_encoder=/nowhere is no folder; download google/t5-v1_1-xxl"):
        load(text_encoder="/nowhere").read_instructions(["open"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"model\.text_encoder=.*empty cannot be read .*sentencepiece"):
        load(text_encoder=str(tmp_path / "empty")).read_instructions(["open"])
    other = tmp_path / "other"
    other.mkdir()
    for path in t5.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    rename(other / "model.safetensors", "encoder.final_layer_norm.weight", "encoder.last_norm.weight")
    with pytest.raises(UserError, match=r"is no T5 encoder, see \['encoder\.final_layer_norm\.weight'"):
        load(text_encoder=str(other)).read_instructions(["open"])
