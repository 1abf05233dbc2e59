import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlaexp.data_types import Observation
from vlaexp.errors import UserError
from vlaexp.model.base import PARTS
from vlaexp.model.tiny import MAX_WORDS, WORDS, TinyVLA, tokenize

Make = Callable[..., TinyVLA]


def suffix(length: int, batch_size: int = 3, width: int = 32) -> torch.Tensor:
    return torch.randn(batch_size, length, width, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("mask_kind", ["bidirectional", "causal"])
def test_forward_equals_prefill_plus_extend(model: TinyVLA, observation: Observation, mask_kind: str) -> None:
    hidden, prefix = model(observation, suffix(5), mask_kind)
    prefilled = model.prefill(observation)
    extended, _ = model.extend(prefilled, suffix(5), mask_kind)
    torch.testing.assert_close(hidden, extended)
    torch.testing.assert_close(prefix.hidden, prefilled.hidden)


@pytest.mark.parametrize("cuts", [[1, 2, 3, 4, 5], [2, 5], [4]])
def test_causal_suffix_in_pieces_equals_all_at_once(model: TinyVLA, observation: Observation, cuts: list[int]) -> None:
    whole, _ = model(observation, suffix(6), "causal")
    prefix, pieces = model.prefill(observation), []
    for piece in torch.tensor_split(suffix(6), cuts, dim=1):
        hidden, prefix = model.extend(prefix, piece, "causal")
        pieces.append(hidden)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)


def test_causal_token_sees_only_tokens_before_it(model: TinyVLA, observation: Observation) -> None:
    other = suffix(6)
    other[:, 3:] *= -1
    one, _ = model(observation, suffix(6), "causal")
    two, _ = model(observation, other, "causal")
    torch.testing.assert_close(one[:, :3], two[:, :3])
    assert not torch.allclose(one[:, 3:], two[:, 3:])


def test_bidirectional_token_sees_all_tokens(model: TinyVLA, observation: Observation) -> None:
    other = suffix(6)
    other[:, -1] *= -1
    one, _ = model(observation, suffix(6), "bidirectional")
    two, _ = model(observation, other, "bidirectional")
    assert not torch.allclose(one[:, 0], two[:, 0])


def test_suffix_of_nothing_leaves_the_prefix_as_it_was(model: TinyVLA, observation: Observation) -> None:
    before = model.prefill(observation)
    _, after = model.extend(before, suffix(4), "causal")
    assert before.cache.suffix is None
    torch.testing.assert_close(before.hidden, after.hidden)


def test_gradient_reaches_every_part(model: TinyVLA, observation: Observation) -> None:
    hidden, prefix = model(observation, suffix(4), "bidirectional")
    (hidden.square().sum() + prefix.goal.square().sum()).backward()
    for part in PARTS:
        total = sum(float(p.grad.abs().sum()) for p in model.part(part).parameters() if p.grad is not None)
        assert total > 0, part
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_rows_of_a_batch_are_independent(model: TinyVLA, observation: Observation) -> None:
    together, _ = model(observation, suffix(4), "bidirectional")
    for row in range(3):
        alone = Observation(
            {name: image[row : row + 1] for name, image in observation.images.items()},
            observation.state[row : row + 1],
            [observation.instruction[row]],
        )
        hidden, _ = model(alone, suffix(4)[row : row + 1], "bidirectional")
        torch.testing.assert_close(hidden[0], together[row], rtol=1e-4, atol=1e-5)


def test_repeat_repeats_whole_batches(model: TinyVLA, observation: Observation) -> None:
    prefix = model.repeat(model.prefill(observation), 2)
    hidden, _ = model.extend(prefix, suffix(4).repeat(2, 1, 1), "bidirectional")
    once, _ = model(observation, suffix(4), "bidirectional")
    torch.testing.assert_close(hidden, once.repeat(2, 1, 1), rtol=1e-4, atol=1e-5)


def test_instruction_image_and_state_all_matter(model: TinyVLA, observation: Observation) -> None:
    base = model.prefill(observation).hidden
    others = [
        replace(observation, instruction=["close the drawer"] * 3),
        replace(observation, state=observation.state + 1),
        replace(observation, images=observation.images | {"wrist": 255 - observation.images["wrist"]}),
    ]
    for other in others:
        assert not torch.allclose(base, model.prefill(other).hidden, atol=1e-6)


def test_cached_features_replace_images(model: TinyVLA, observation: Observation) -> None:
    features = {name: model.encode_images(image[:, -1], name) for name, image in observation.images.items()}
    cached = Observation({}, observation.state, observation.instruction, features)
    torch.testing.assert_close(model.prefill(cached).hidden, model.prefill(observation).hidden)


def test_evaluation_is_deterministic_and_training_is_not(model: TinyVLA, observation: Observation) -> None:
    assert torch.equal(model.prefill(observation).hidden, model.prefill(observation).hidden)
    model.train()
    assert not torch.equal(model.prefill(observation).hidden, model.prefill(observation).hidden)


def test_known_words_have_their_own_ids() -> None:
    ids = tokenize("Pick up the RED cube!")
    assert [WORDS[i] for i in ids[:5]] == ["pick", "up", "the", "red", "cube"]
    assert ids[5:] == [0] * (MAX_WORDS - 5)


def test_unknown_word_becomes_unk() -> None:
    assert tokenize("pick up the giraffe")[3] == WORDS.index("<unk>")
    assert tokenize("")[0] == WORDS.index("<unk>")
    assert len(set(WORDS)) == len(WORDS)


def test_long_instruction_is_cut() -> None:
    assert len(tokenize("the red cube " * 20)) == MAX_WORDS


def test_images_of_any_size_are_padded_to_the_square(model: TinyVLA) -> None:
    wide = torch.full((2, 3, 24, 48), 200, dtype=torch.uint8)
    out = model.preprocess_images(wide)
    assert out.shape == (2, 3, 16, 16)
    assert out[:, :, :4].max() == 0
    assert out[:, :, 12:].max() == 0
    assert out[:, :, 4:12].min() == 200
    assert torch.equal(model.preprocess_images(out), out), "not idempotent"


def test_missing_camera_is_named(model: TinyVLA, make_observation: Callable[..., Observation]) -> None:
    with pytest.raises(UserError, match=r"no camera \['wrist'\].*has \['front', 'side'\].*dataset\.cameras"):
        model.prefill(make_observation(cameras=("front", "side")))


# ---- weights on disk ----------------------------------------------------------------------------------------------


def test_weights_are_loaded_as_saved(weights: Path, make_model: Make) -> None:
    saved, loaded = load_file(weights / "base.safetensors"), make_model(weights=str(weights))
    own = loaded.state_dict()
    assert {name for name in own if not name.startswith("decoder.")} == set(saved)
    assert all(torch.equal(own[name], value) for name, value in saved.items())
    assert loaded.training_seeds == ((100, 108),)
    assert loaded.input_stats() is not None


def test_state_size_comes_from_the_weights(weights: Path, make_model: Make) -> None:
    assert make_model(weights=str(weights), state_dim=None).state_dim == 8
    with pytest.raises(UserError, match="needs a state size; train it on a dataset first"):
        make_model(state_dim=None)


def damage(weights: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(weights / "base.safetensors")
    change(tensors)
    save_file(tensors, weights / "base.safetensors")


def test_missing_key_fails_with_its_name(weights: Path, make_model: Make) -> None:
    damage(weights, lambda tensors: tensors.pop("vision.norm.weight"))
    with pytest.raises(UserError, match=r"missing \['vision\.norm\.weight'\]; unknown none"):
        make_model(weights=str(weights))


def test_unknown_key_fails_with_the_nearest_name(weights: Path, make_model: Make) -> None:
    damage(weights, lambda tensors: tensors.update({"vision.norm.weigth": torch.zeros(2)}))
    with pytest.raises(UserError, match=r"missing none.*vision\.norm\.weigth.*nearest: vision\.norm\.weight"):
        make_model(weights=str(weights))


def test_wrong_shape_fails_with_both_shapes(weights: Path, make_model: Make) -> None:
    damage(weights, lambda tensors: tensors.update({"vision.norm.weight": torch.zeros(3)}))
    with pytest.raises(UserError, match=r"vision\.norm\.weight: file \(3,\), model \(64,\)"):
        make_model(weights=str(weights))


def test_damaged_file_is_named(weights: Path, make_model: Make) -> None:
    path = weights / "base.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"base\.safetensors is damaged .*copy or train it again"):
        make_model(weights=str(weights))


def test_missing_file_lists_its_neighbours(weights: Path, make_model: Make) -> None:
    (weights / "base.safetensors").unlink()
    with pytest.raises(UserError, match=r"base\.safetensors does not exist.*config\.json"):
        make_model(weights=str(weights))


def test_missing_folder_says_what_to_do(tmp_path: Path, make_model: Make) -> None:
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "none")) + r".*model\.weights=shipped.*or null"):
        make_model(weights=str(tmp_path / "none"))


@pytest.mark.parametrize(("key", "value"), [("image_size", 32), ("width", 64), ("cameras", ["front"])])
def test_other_size_than_the_weights_is_refused(weights: Path, make_model: Make, key: str, value: object) -> None:
    with pytest.raises(UserError) as caught:
        make_model(weights=str(weights), **{key: value})
    text = str(caught.value)
    assert f"{key}={json.loads((weights / 'config.json').read_text())[key]}" in text
    assert f"model.{key}={value}" in text
    assert "model.weights=null" in text


def test_another_robot_starts_its_own_layers_anew(weights: Path, make_model: Make) -> None:
    model = make_model(weights=str(weights), state_dim=11)
    assert model.reinitialized == ("language.state.",)
    assert model.input_stats() is None
    assert torch.equal(model.vision.norm.weight, load_file(weights / "base.safetensors")["vision.norm.weight"])


def test_shipped_decoder_is_found_by_head_and_space(weights: Path, make_model: Make) -> None:
    (weights / "flow_ee_delta").mkdir()
    model = make_model(weights=str(weights))
    assert model.pretrained_decoder("flow", "ee_delta") == weights / "flow_ee_delta"
    assert model.pretrained_decoder("flow", "joint") is None
    assert make_model(weights=str(weights), state_dim=11).pretrained_decoder("flow", "ee_delta") is None


def test_fingerprint_is_that_of_the_weights(weights: Path, make_model: Make) -> None:
    first = make_model(weights=str(weights)).weights_fingerprint()
    torch.manual_seed(5)  # of the decoder, which is not part of the base
    assert make_model(weights=str(weights)).weights_fingerprint() == first
    damage(weights, lambda tensors: tensors["language.norm.bias"].add_(1e-6))
    assert make_model(weights=str(weights)).weights_fingerprint() != first
