"""Random weights at sizes of one's own: the same for the same seed, of the published tree, and never in silence."""

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from hydra.utils import get_class

from vlaexp.config import compose, resolved
from vlaexp.errors import UserError
from vlaexp.model.base import PrefixModel
from vlaexp.model.scratch import check_sizes, word_tokenizer, word_vectors
from vlaexp.trainer.build import build_model

HEADS = {"openvla_tiny": "discrete_token", "pi0_tiny": "flow", "smolvla_tiny": "flow", "rdt_tiny": "diffusion"}
PUBLISHED = {"openvla_tiny": "openvla_7b", "pi0_tiny": "pi0", "smolvla_tiny": "smolvla", "rdt_tiny": "rdt_1b"}


def build(choice: str, head: str, *overrides: str) -> Any:
    config = resolved(compose("train", [f"model={choice}", f"head={head}", *overrides]))
    return build_model(config, state_dim=17, has_goal=False, action_dim=7)


@pytest.mark.parametrize("choice", HEADS)
def test_the_seed_decides_the_weights(choice: str) -> None:
    first, second, other = (build(choice, HEADS[choice], *more) for more in ([], [], ["seed=1"]))
    assert first.weights_fingerprint() == second.weights_fingerprint() != other.weights_fingerprint()
    assert {p.dtype for p in first.parameters()} == {torch.float32}
    assert not any(value.is_meta for value in first.state_dict(keep_vars=True).values())


@pytest.mark.parametrize("choice", HEADS)
def test_a_tiny_form_is_planned_at_its_size(choice: str) -> None:
    model = build(choice, HEADS[choice])
    with torch.device("meta"):
        planned = build(choice, HEADS[choice])
    sizes = [{name: (p.shape, p.dtype) for name, p in m.named_parameters()} for m in (model, planned)]
    assert sizes[0] == sizes[1]
    assert sum(p.numel() for p in model.parameters()) < 3e6


@pytest.mark.parametrize("choice", HEADS)
def test_a_tiny_form_has_the_modules_of_the_published_one(choice: str) -> None:
    tiny = build(choice, HEADS[choice])
    with torch.device("meta"):
        whole = build(PUBLISHED[choice], HEADS[choice])

    def parameters(model: PrefixModel) -> set[str]:
        names = (name for name, _ in model.named_parameters())
        return {".".join("0" if word.isdigit() else word for word in name.split(".")) for name in names}

    # DINOv2's LayerScale, cross-attention layers and all: but for layer numbers, names are the same
    assert parameters(tiny) == parameters(whole)


@pytest.mark.parametrize("choice", HEADS)
def test_a_tiny_form_reads_words(choice: str, make_observation: Any) -> None:
    model = build(choice, HEADS[choice]).eval()
    observation = make_observation(3, side=64)
    images = {name: image.expand(-1, model.n_obs_steps, -1, -1, -1) for name, image in observation.images.items()}
    observation = replace(observation, images=images, state=torch.zeros(3, model.n_obs_steps, 17))
    with torch.inference_mode():
        prefix = model.prefill(observation)
    assert torch.isfinite(prefix.hidden).all()
    assert not hasattr(model, "prompt") or model.prompt("pick up the red cube") != model.prompt("pick up the blue cube")


def test_oft_parts_join_random_weights(make_observation: Any) -> None:
    oft = build("openvla_tiny", "ee_delta", "model.oft=true")
    with torch.device("meta"):
        planned = build("openvla_tiny", "ee_delta", "model.oft=true")
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (oft, planned)]
    assert shapes[0] == shapes[1]
    assert shapes[0]["projector.proprio.fc1.weight"][1] == 17
    assert shapes[0]["decoder.action_head.model.fc2.weight"][0] == 7
    assert oft.reinitialized == ("decoder.action_head.", "projector.proprio.")
    assert oft.weights_fingerprint() == build("openvla_tiny", "discrete_token").weights_fingerprint()
    observation = replace(make_observation(2, side=64), state=torch.randn(2, 1, 17))
    with torch.inference_mode():
        actions = oft.eval().chunk_decoder.regress(oft.prefill(observation), 4)
    assert actions.shape == (2, 4, 7)
    assert actions.isfinite().all()


def test_rdts_dropout_has_a_vector_of_no_words(make_observation: Any) -> None:
    model = build("rdt_tiny", "diffusion", "model.condition_dropout=0.999", "model.state_noise_snr=null").train()
    model.read_instructions(["open"])
    observation = make_observation(2, side=64)
    images = {name: image.expand(-1, 2, -1, -1, -1) for name, image in observation.images.items()}
    observation = replace(observation, images=images, state=torch.zeros(2, 2, 17))
    torch.manual_seed(0)
    lost = model.prefill(observation).cache
    unsaid = model.eval().prefill(replace(observation, instruction=["", ""])).cache
    assert lost.language_mask.tolist() == [[True], [True]]
    torch.testing.assert_close(lost.keys_values[0], unsaid.keys_values[0])


def test_many_cameras_of_random_weights_are_refused() -> None:
    cameras = "model.cameras=[front,wrist]"
    with pytest.raises(UserError, match=r"language model of model\.sizes is made for 100 tokens: take at most 1"):
        build("openvla_tiny", "ee_delta", cameras, "+model.sizes.text.max_position_embeddings=100")


def test_sizes_are_for_random_weights() -> None:
    with pytest.raises(UserError, match=r"model.sizes=\{'depth': 3\} is for random weights, model.weights=some/hub-id"):
        check_sizes({"depth": 3}, "some/hub-id", ["depth"])
    with pytest.raises(UserError, match=r"model\.sizes has 'dept', which this base lacks"):
        check_sizes({"dept": 3}, None, ["depth", "width"])
    with pytest.raises(UserError, match=r"model.sizes has \['language'\] but not \['expert', 'vision'\]; give all of"):
        build("pi0_tiny", "flow", "~model.sizes.vision", "~model.sizes.expert")
    with pytest.raises(UserError, match=r"of model\.sizes\.vision gives 16 tokens of width 96 per image"):
        build("rdt_tiny", "diffusion", "model.sizes.vision.patch_size=16")
    with pytest.raises(UserError, match=r"language_embeddings=some/folder; .*go with"):
        build("rdt_tiny", "diffusion", "model.language_embeddings=some/folder")
    with pytest.raises(UserError, match=r"model\.weights=some/folder, .*language_embeddings=None; loaded weights need"):
        build("rdt_1b", "diffusion", "model.weights=some/folder", "model.language_embeddings=null")
    with pytest.raises(UserError, match=r"model\.sizes resizes images to"):
        build("smolvla_tiny", "flow", "model.sizes.resize_imgs_with_padding=[32,32]")


def test_every_tiny_form_names_its_sizes() -> None:
    for choice in HEADS:
        config = resolved(compose("train", [f"model={choice}", f"head={HEADS[choice]}"]))["model"]
        assert config["weights"] is None
        assert config["sizes"]
        assert "sizes" in inspect.signature(get_class(config["_target_"])).parameters


def test_words_of_the_embedded_world_are_told_apart() -> None:
    tokenizer = word_tokenizer(("<bos>", "<unk>"), 200)
    ids = tokenizer.encode("Pick up the red cube, gently!", add_special_tokens=False).ids
    assert tokenizer.id_to_token(ids[3]) == "red"
    assert len(set(ids[:5])) == 5
    assert ids[5] == tokenizer.token_to_id("<unk>")
    with pytest.raises(UserError, match="leaves a vocabulary of 50 words, the tokenizer has"):
        word_tokenizer(("<unk>",), 50)


def test_a_word_has_one_vector() -> None:
    red, blue = word_vectors("the RED cube", 8), word_vectors("a blue cube", 8)
    assert red.shape == (3, 8)
    assert torch.equal(red[2], blue[2])
    assert not torch.equal(red[1], blue[1])
    assert word_vectors("", 8).shape == (1, 8)
