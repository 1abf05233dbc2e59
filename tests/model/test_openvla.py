"""OpenVLA against its reference implementation, and the laws of every base model.

tests/openvla_golden.npz was recorded from github.com/openvla/openvla at commit c8f03f4 (its prismatic/extern/hf modules
and ActionTokenizer) with transformers 4.40.1, tokenizers 0.19.1, timm 0.9.16 and torch 2.11 on a CPU in float32: the
model was built from `openvla_checkpoint.CONFIG` (timm.create_model given its `timm_model_args`), took
`openvla_checkpoint.tensor` under the reference's own key names by a strict load_state_dict, and its LlamaTokenizerFast,
PrismaticImageProcessor, forward (labels as RLDSBatchTransform sets them, two rows padded on the right) and
predict_action ran on `openvla_checkpoint.images`, `INSTRUCTIONS` and `ACTIONS`.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import openvla_checkpoint as published
import pytest
import torch

from vlaexp.data_types import Observation
from vlaexp.errors import UserError
from vlaexp.ledger import ledger
from vlaexp.lora import Freeze, Lora, add_adapter, freeze_parts
from vlaexp.model.base import PARTS
from vlaexp.model.openvla import OpenVLA
from vlaexp.model.openvla_checkpoint import OpenVLAConfig

Make = Callable[..., OpenVLA]
GOLDEN = published.recorded()


@pytest.fixture(scope="module")
def loaded(openvla_weights: Path) -> OpenVLA:
    return OpenVLA(["front"], 8, 0, weights=str(openvla_weights)).eval()


@pytest.fixture
def model(loaded: OpenVLA) -> OpenVLA:
    return copy.deepcopy(loaded)


@pytest.fixture
def make(openvla_weights: Path) -> Make:
    def of(**given) -> OpenVLA:
        return OpenVLA(
            **({"cameras": ["front"], "state_dim": 8, "goal_dim": 0, "weights": str(openvla_weights)} | given)
        )

    return of


@pytest.fixture
def observation() -> Observation:
    pictures = torch.from_numpy(published.images()).permute(0, 3, 1, 2)[:, None].contiguous()
    return Observation({"front": pictures}, torch.zeros(2, 1, 8), published.INSTRUCTIONS)


def recorded(name: str) -> torch.Tensor:
    return torch.from_numpy(GOLDEN[name])


def suffix(length: int = 5, batch_size: int = 2) -> torch.Tensor:
    return torch.randn(batch_size, length, 32, generator=torch.Generator().manual_seed(7))


# ---- equality with the reference --------------------------------------------------------------------------------


def test_images_are_the_references(model: OpenVLA, observation: Observation) -> None:
    small = model.preprocess_images(observation.images["front"][:, 0])
    assert torch.equal(small, recorded("resized"))
    assert torch.equal(model.preprocess_images(small), small), "not idempotent"


def test_features_and_projection_are_the_references(model: OpenVLA) -> None:
    features = model.encode_images(recorded("resized"), "front")
    torch.testing.assert_close(features, recorded("features"), rtol=0, atol=1e-5)
    torch.testing.assert_close(model.projector(features), recorded("projected"), rtol=0, atol=1e-5)


def test_prompts_are_the_references(model: OpenVLA) -> None:
    for row, instruction in enumerate(published.INSTRUCTIONS):
        assert model.prompt(instruction) == GOLDEN[f"prompt_{row}"].tolist()
    assert model.action_vocabulary.start == 29871
    assert model.action_vocabulary.end == 2


def test_logits_are_the_references(model: OpenVLA, observation: Observation) -> None:
    vocabulary = model.action_vocabulary
    ids = torch.cat([torch.full((2, 1), vocabulary.start), recorded("action_ids")], 1)
    hidden, _ = model(observation, vocabulary.embed(ids), "causal")
    logits = vocabulary.logits(hidden)
    assert logits.shape == (2, 8, 32064)
    torch.testing.assert_close(logits[..., GOLDEN["kept"]], recorded("logits"), rtol=0, atol=1e-5)


def test_loss_is_the_references(model: OpenVLA, observation: Observation) -> None:
    vocabulary = model.action_vocabulary
    ids = vocabulary.encode(torch.from_numpy(published.ACTIONS))
    assert torch.equal(ids, recorded("action_ids"))
    hidden, _ = model(
        observation, vocabulary.embed(torch.nn.functional.pad(ids, (1, 0), value=vocabulary.start)), "causal"
    )
    wanted = torch.nn.functional.pad(ids, (0, 1), value=vocabulary.end)
    losses = torch.nn.functional.cross_entropy(vocabulary.logits(hidden).mT, wanted, reduction="none")
    torch.testing.assert_close(losses.mean(), recorded("loss"), rtol=0, atol=1e-5)
    torch.testing.assert_close(losses.mean(1).double(), recorded("row_losses").double(), rtol=0, atol=1e-5)


# ---- sizes of the published model ---------------------------------------------------------------------------------


def test_the_7b_model_and_its_adapters_have_the_published_sizes() -> None:
    with torch.device("meta"):
        model = OpenVLA(["front"], 8, 0)
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_541_237_184
    everything, lora = Freeze(PARTS), Lora(rank=32, targets=PARTS)
    freeze_parts(model, everything)
    with torch.device("meta"):
        add_adapter(model, lora, everything)
    found = ledger(model, [], lora)
    assert found.adapter == found.trainable == 110_828_288
    assert found.base == 7_541_237_184
    adapted = set(found.adapted_modules)
    towers = ("featurizer", "fused_featurizer")
    assert {"decoder.lm_head", *(f"vision.{tower}.patch_embed.proj" for tower in towers)} <= adapted


def test_language_model_is_as_the_checkpoint_says() -> None:
    text = OpenVLAConfig().llama()
    assert (text.rms_norm_eps, text.rope_parameters["rope_theta"], text.vocab_size) == (1e-6, 1e4, 32064)


# ---- laws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_kind", ["bidirectional", "causal"])
def test_forward_equals_prefill_plus_extend(model: OpenVLA, observation: Observation, mask_kind: str) -> None:
    hidden, _ = model(observation, suffix(), mask_kind)
    prefix = model.prefill(observation)
    for _ in range(2):  # the first call leaves the prefix as it was
        torch.testing.assert_close(model.extend(prefix, suffix(), mask_kind)[0], hidden)


def test_cached_language_equals_transformers_own_forward(model: OpenVLA, observation: Observation) -> None:
    one = replace(observation, images={"front": observation.images["front"][:1]}, state=observation.state[:1])
    one = replace(one, instruction=published.INSTRUCTIONS[:1])
    hidden, _ = model(one, suffix(5, 1), "causal")
    words = model.language.embed_tokens(recorded("prompt_0"))[None]
    whole = torch.cat([words[:, :1], recorded("projected")[:1], words[:, 1:], suffix(5, 1)], 1)
    wanted = model.language(inputs_embeds=whole).last_hidden_state[:, -5:]
    torch.testing.assert_close(hidden, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cuts", [[1, 2, 3, 4], [2], []])
def test_causal_suffix_in_pieces_equals_all_at_once(model: OpenVLA, observation: Observation, cuts: list[int]) -> None:
    whole, _ = model(observation, suffix(), "causal")
    prefix, pieces = model.prefill(observation), []
    for piece in torch.tensor_split(suffix(), cuts, dim=1):
        hidden, prefix = model.extend(prefix, piece, "causal")
        pieces.append(hidden)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)


def test_masks_let_tokens_see_what_they_say(model: OpenVLA, observation: Observation) -> None:
    other = suffix()
    other[:, -1] *= -1
    for mask_kind, changes in (("causal", False), ("bidirectional", True)):
        one, two = (model(observation, given, mask_kind)[0][:, 0] for given in (suffix(), other))
        assert torch.allclose(one, two) != changes


@pytest.mark.parametrize("mask_kind", ["bidirectional", "causal"])
def test_rows_are_independent_of_neighbours_and_padding(
    model: OpenVLA, observation: Observation, mask_kind: str
) -> None:
    together, _ = model(observation, suffix(), mask_kind)
    for row in range(2):
        picture = {"front": observation.images["front"][row : row + 1]}
        alone = Observation(picture, observation.state[:1], [observation.instruction[row]])
        hidden, _ = model(alone, suffix()[row : row + 1], mask_kind)
        torch.testing.assert_close(hidden[0], together[row], rtol=1e-4, atol=1e-5)


def test_repeat_repeats_whole_batches(model: OpenVLA, observation: Observation) -> None:
    prefix = model.repeat(model.prefill(observation), 2)
    hidden, _ = model.extend(prefix, suffix().repeat(2, 1, 1), "bidirectional")
    once, _ = model(observation, suffix(), "bidirectional")
    torch.testing.assert_close(hidden, once.repeat(2, 1, 1), rtol=1e-4, atol=1e-5)


def test_cached_features_replace_images(model: OpenVLA, observation: Observation) -> None:
    cached = Observation({}, observation.state, observation.instruction, {"front": recorded("features")})
    torch.testing.assert_close(model.prefill(cached).hidden, model.prefill(observation).hidden, rtol=1e-4, atol=1e-5)


def test_several_cameras_follow_each_other(make: Make, observation: Observation) -> None:
    both = make(cameras=["front", "wrist"]).eval()
    picture = observation.images["front"]
    prefix = both.prefill(replace(observation, images={"front": picture, "wrist": 255 - picture}))
    assert (
        prefix.hidden.shape[1]
        == both.prefill(replace(observation, images={"front": picture, "wrist": picture})).hidden.shape[1]
    )
    with pytest.raises(UserError, match=r"no camera \['wrist'\]; it has \['front'\].*dataset\.cameras"):
        both.prefill(observation)
    with pytest.raises(UserError, match=r"model\.cameras=\[\]; OpenVLA needs at least one camera"):
        make(cameras=[])
    with pytest.raises(UserError, match=r"has 128 of 16 patches each; .*made for 2048 tokens: take at most 127"):
        make(cameras=[f"camera_{i}" for i in range(128)])


def test_gradient_checkpointing_changes_no_gradient(make: Make, observation: Observation) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = make(gradient_checkpointing=checkpointing).train()
        hidden, _ = model(observation, suffix(), "causal")
        model.action_vocabulary.logits(hidden).logsumexp(-1).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, again = gradients
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=name)
    for part in PARTS:
        assert any(name.startswith(f"{part}.") for name in plain), part


def test_bfloat16_weights_give_float32_hidden_states(make: Make, observation: Observation) -> None:
    model = make(dtype="bfloat16").eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    hidden, prefix = model(observation, suffix(), "causal")
    assert hidden.dtype == prefix.hidden.dtype == torch.float32
    torch.testing.assert_close(hidden, make().eval()(observation, suffix(), "causal")[0], rtol=0.3, atol=0.3)


def test_central_crop_is_for_evaluation_alone(make: Make) -> None:
    model, plain = make(center_crop=True), make()
    small = recorded("resized")
    torch.testing.assert_close(model.train().encode_images(small, "front"), plain.encode_images(small, "front"))
    assert not torch.allclose(model.eval().encode_images(small, "front"), plain.encode_images(small, "front"))
    assert "central 90%" in model.image_pipeline()
    assert model.crops_at_evaluation


def test_statistics_of_a_pretraining_dataset(make: Make) -> None:
    assert make().input_stats() is None
    stats = make(unnorm_key="bridge_orig").input_stats().quantities["action"]
    assert stats.mode == "q01_q99"
    np.testing.assert_allclose(stats.q99, [0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.0])
    np.testing.assert_allclose(stats.q01[-1], -1), "the gripper's mask"
    with pytest.raises(
        UserError, match=r"unnorm_key=bridge is not .*available: bridge_orig, libero_spatial; nearest: bri"
    ):
        make(unnorm_key="bridge")
