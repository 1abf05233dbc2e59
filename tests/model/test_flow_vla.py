"""pi0 and SmolVLA against LeRobot's own policies at tiny size, live, and the laws of every base model."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import lerobot_checkpoints as published
import numpy as np
import pytest
import torch
from flow_vla_cases import KINDS, Case, written
from lerobot.policies.common.vla_utils import make_att_2d_masks, prepare_attention_masks_4d

from vlaexp.action_spec import ActionSpec
from vlaexp.data_types import Batch, Observation
from vlaexp.dataset.normalize import NormStats, Statistics
from vlaexp.errors import UserError
from vlaexp.head.flow import FlowHead
from vlaexp.lora import Freeze, Lora, add_adapter, freeze_parts
from vlaexp.model.base import PARTS
from vlaexp.model.flow_vla import FlowVLA
from vlaexp.model.pi0 import Pi0
from vlaexp.model.smolvla import SmolVLA


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Case]]:
    with written(tmp_path_factory.mktemp("published")) as made:
        yield made


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return cases[request.param]


@pytest.fixture
def model(case: Case) -> FlowVLA:
    return copy.deepcopy(case.ours)


@pytest.fixture
def make(case: Case) -> Callable[..., FlowVLA]:
    return case.make


@pytest.fixture
def observation(case: Case) -> Observation:
    return observe(case.ours.side)


def observe(height: int, width: int | None = None) -> Observation:
    generator = torch.Generator().manual_seed(1)
    shape = (2, 1, 3, height, width or height)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    state = torch.randn(2, 1, published.STATE_DIM, generator=generator)
    return Observation({"front": images}, state, published.INSTRUCTIONS)


def inputs(case: Case, observation: Observation) -> tuple[Any, ...]:
    """Images, masks, tokens, masks and state as LeRobot's policies hand them to their model."""
    batch = {"observation.images.front": observation.images["front"][:, 0] / 255}
    prepare = getattr(case.theirs, "_preprocess_images" if case.name == "pi0" else "prepare_images")
    prompts = [torch.tensor(case.ours.prompt(text)) for text in observation.instruction]
    tokens = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    real = torch.arange(tokens.shape[1]) < torch.tensor([[len(prompt)] for prompt in prompts])
    state = case.theirs.prepare_state({"observation.state": observation.state[:, -1]})
    return *prepare(batch), tokens, real, state


def flow_head(model: FlowVLA, horizon: int = published.HORIZON, **given: Any) -> FlowHead:
    names = tuple(f"joint_{i}" for i in range(published.ACTION_DIM))
    spec = ActionSpec("native", names, ("rad",) * len(names), 10.0)

    def unit(*shape: int) -> Statistics:
        zero, one = np.zeros(shape), np.ones(shape)
        return Statistics("mean_std", zero, one, -one, one, -one, one)

    stats = NormStats({"state": unit(published.STATE_DIM), "action": unit(published.ACTION_DIM)}, {}, "unit")
    common: dict[str, Any] = {
        "action_horizon": horizon,
        "n_action_steps": 1,
        "optimizer": torch.optim.AdamW,
        "schedule": len,
    }
    return FlowHead(model=model, spec=spec, norm_stats=stats, **(common | given))


def suffix(model: FlowVLA, length: int = 5, batch_size: int = 2) -> torch.Tensor:
    return torch.randn(batch_size, length, model.width, generator=torch.Generator().manual_seed(7))


def drawn(width: int = 32) -> tuple[torch.Tensor, ...]:
    """Noise, times as LeRobot counts them, and normalized actions."""
    generator = torch.Generator().manual_seed(11)
    noise = torch.randn(2, published.HORIZON, width, generator=generator)
    action = torch.randn(2, published.HORIZON, published.ACTION_DIM, generator=generator)
    return noise, torch.tensor([0.3, 0.9]), action


# ---- equality with LeRobot --------------------------------------------------------------------------------------


def test_prefix_is_lerobots(case: Case, model: FlowVLA, observation: Observation) -> None:
    """Hidden states, and keys and values of every layer."""
    given = inputs(case, observation)
    if case.name == "pi0":
        inner = case.theirs.model
        embedded, real, blocks = inner.embed_prefix(*given[:4])
        whole, attend = inner.paligemma_with_expert, prepare_attention_masks_4d(make_att_2d_masks(real, blocks))
    else:
        inner = case.theirs.model
        embedded, real, blocks = inner.embed_prefix(*given)
        whole, attend = inner.vlm_with_expert, make_att_2d_masks(real, blocks)
    with torch.no_grad():
        (hidden, _), cache = whole(
            attention_mask=attend, position_ids=real.cumsum(1) - 1, inputs_embeds=[embedded, None], use_cache=True
        )
        prefix = model.prefill(observation)
    assert torch.equal(prefix.mask, real)
    torch.testing.assert_close(prefix.hidden[real], hidden[real], rtol=0, atol=1e-5)
    for ours, theirs in zip(prefix.cache.layers, cache.layers, strict=True):
        for mine, other in zip(ours, (theirs.keys, theirs.values), strict=True):
            torch.testing.assert_close(mine.transpose(1, 2)[real], other.transpose(1, 2)[real], rtol=0, atol=1e-5)


def test_loss_is_lerobots(
    case: Case, model: FlowVLA, observation: Observation, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise, time, action = drawn()
    with torch.no_grad():
        losses = case.theirs.model.forward(
            *inputs(case, observation), case.theirs.prepare_action({"action": action}), noise, time
        )
        head = flow_head(model, samples_per_observation=1)
        head._sample_time = lambda count, device: 1 - time
        monkeypatch.setattr(torch, "randn_like", lambda x: noise)
        batch = Batch(observation, action, torch.zeros(2, published.HORIZON, dtype=torch.bool))
        loss, _ = head.compute_loss(batch)
    torch.testing.assert_close(loss, losses[..., : published.ACTION_DIM].mean(), rtol=0, atol=1e-5)


def test_actions_are_lerobots(case: Case, model: FlowVLA, observation: Observation) -> None:
    noise, _, _ = drawn()
    with torch.no_grad():
        wanted = case.theirs.model.sample_actions(*inputs(case, observation), noise=noise)
        found = flow_head(model).predict_action(observation, noise).action
    torch.testing.assert_close(found, wanted[..., : published.ACTION_DIM], rtol=0, atol=1e-5)


def test_velocity_runs_from_noise_to_action(case: Case, model: FlowVLA, observation: Observation) -> None:
    """LeRobot's network at time 1 - t predicts noise - action; ours at t predicts action - noise, at the same point."""
    noise, time, action = drawn()
    x_1 = torch.nn.functional.pad(action, (0, 32 - published.ACTION_DIM))
    theirs = time[:, None, None] * noise + (1 - time)[:, None, None] * x_1
    t = 1 - time
    torch.testing.assert_close((1 - t)[:, None, None] * noise + t[:, None, None] * x_1, theirs)
    seen = {}
    model.model.embed_suffix = lambda *given: (
        seen.update(time=given[-1]) or type(model.model).embed_suffix(model.model, *given)
    )
    with torch.no_grad():
        model.velocity(model.prefill(observation), theirs, t)
    torch.testing.assert_close(seen["time"], time)


def test_images_are_lerobots_to_half_a_grey_level(case: Case, model: FlowVLA) -> None:
    observation = observe(40, 60)
    (wanted, *_), *_ = inputs(case, observation)
    small = model.preprocess_images(observation.images["front"][:, 0])
    assert small.dtype == torch.uint8
    torch.testing.assert_close(small / 255 * 2 - 1, wanted, rtol=0, atol=1.001 / 255)
    assert torch.equal(model.preprocess_images(small), small), "not idempotent"


def test_times_are_lerobots(case: Case, model: FlowVLA) -> None:
    torch.manual_seed(0)
    ours = 1 - flow_head(model)._sample_time(20_000, torch.device("cpu"))
    theirs = case.theirs.model.sample_time(20_000, "cpu")
    points = torch.linspace(0.01, 0.99, 30)
    torch.testing.assert_close(ours.quantile(points), theirs.quantile(points), rtol=0, atol=0.02)
    assert 0.001 <= ours.min() < ours.max() <= 1.0


def test_published_sampling_is_the_default(model: FlowVLA) -> None:
    head = flow_head(model)
    assert (head._num_steps, head._prediction, head._time_sampling) == (10, "velocity", "beta")
    assert head.noise_shape == (published.HORIZON, 32)
    assert [name for name, _ in head.named_parameters() if not name.startswith("model.")] == []


# ---- sizes of the published models --------------------------------------------------------------------------------


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def full(kind: type[FlowVLA]) -> FlowVLA:
    with torch.device("meta"):
        return kind(["front"], 8)


def gemma(width: int, mlp: int, depth: int = 18, head: int = 256, heads: int = 8) -> int:
    return depth * (2 * width * head * heads + 2 * width * head + 3 * width * mlp + 2 * width) + width


def test_pi0_has_the_published_size() -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ORIGINAL.items():
            patch.setattr(published.modeling_pi0, name, value)
        model = full(Pi0)
        with torch.device("meta"):
            theirs = published.modeling_pi0.PI0Pytorch(published.PI0Config(device="cpu"))
    words, vision = 257152, 1152
    block = 4 * (vision**2 + vision) + 2 * vision * 4304 + 4304 + vision + 4 * vision
    tower = (3 * 14**2 + 1) * vision + 256 * vision + 27 * block + 2 * vision
    projections = 2 * (32 * 1024 + 1024) + 1024 * 32 + 32 + 2048 * 1024 + 1024 + 1024**2 + 1024
    vlm = tower + (vision + 1) * 2048 + words * 2048 + gemma(2048, 16384)
    assert count(model) == vlm + gemma(1024, 4096) + projections == 3_238_048_528
    unused = words * 1024 + words * 2048
    assert count(model) + unused == count(theirs) == 4_028_019_472
    assert {f"model.{name}" for name in theirs.state_dict()} == {*model.state_dict(), *Pi0.unused}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_smolvla_has_the_published_size() -> None:
    """450,046,176 parameters, 99,880,992 of them in the expert, is what LeRobot's trainer prints of smolvla_base."""
    model = full(SmolVLA)
    by_part = {
        part: sum(p.numel() for name, p in model.named_parameters() if model.part_of(name) == part) for part in PARTS
    }
    state = 32 * 960 + 960
    assert by_part["decoder"] + state == 99_880_992
    assert count(model) + 49280 * 960 == 450_046_176
    assert by_part["vision"] == (3 * 16**2 + 1) * 768 + 1024 * 768 + 12 * (12 * 768**2 + 13 * 768) + 2 * 768
    assert by_part["projector"] == 16 * 768 * 960 + state
    assert by_part["language"] == 49280 * 960 + 16 * (2 * 960**2 + 2 * 960 * 320 + 3 * 960 * 2560 + 2 * 960) + 960
    assert model.language.rotary_emb.config.rope_parameters["rope_theta"] == 10_000


def test_smolvla_sees_positions_as_the_library_does() -> None:
    vision = full(SmolVLA).part("vision").embeddings
    sides = vision.num_patches_per_side
    small = type(vision)(SimpleNamespace(hidden_size=4, image_size=sides * 2, patch_size=2, num_channels=3))  # type: ignore[arg-type]
    images, mask = torch.randn(1, 3, sides * 2, sides * 2), torch.ones(1, sides, sides, dtype=torch.bool)
    wanted = small.patch_embedding(images).flatten(2).mT + small.position_embedding.weight
    torch.testing.assert_close(small(images, mask), wanted)


ORIGINAL = {
    name: getattr(published.modeling_pi0, name)
    for name in ("get_gemma_config", "PaliGemmaForConditionalGenerationWithPiGemma", "PiGemmaForCausalLM")
}


# ---- laws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_kind", ["bidirectional", "causal"])
def test_forward_equals_prefill_plus_extend(model: FlowVLA, observation: Observation, mask_kind: str) -> None:
    hidden, _ = model(observation, suffix(model), mask_kind)
    prefix = model.prefill(observation)
    for _ in range(2):  # the first call leaves the prefix as it was
        torch.testing.assert_close(model.extend(prefix, suffix(model), mask_kind)[0], hidden)


@pytest.mark.parametrize("cuts", [[1, 2, 3, 4], [2], []])
def test_causal_suffix_in_pieces_equals_all_at_once(model: FlowVLA, observation: Observation, cuts: list[int]) -> None:
    whole, _ = model(observation, suffix(model), "causal")
    prefix, pieces = model.prefill(observation), []
    for piece in torch.tensor_split(suffix(model), cuts, dim=1):
        hidden, prefix = model.extend(prefix, piece, "causal")
        pieces.append(hidden)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)


def test_masks_let_tokens_see_what_they_say(model: FlowVLA, observation: Observation) -> None:
    other = suffix(model)
    other[:, -1] *= -1
    for mask_kind, changes in (("causal", False), ("bidirectional", True)):
        one, two = (model(observation, given, mask_kind)[0][:, 0] for given in (suffix(model), other))
        assert torch.allclose(one, two) != changes


def alone(observation: Observation, row: int) -> Observation:
    images = {name: image[row : row + 1] for name, image in observation.images.items()}
    return Observation(images, observation.state[row : row + 1], [observation.instruction[row]])


def test_rows_are_independent_of_neighbours_and_padding(model: FlowVLA, observation: Observation) -> None:
    noise, _, _ = drawn()
    head = flow_head(model)
    with torch.no_grad():
        hidden, _ = model(observation, suffix(model), "bidirectional")
        actions = head.predict_action(observation, noise).action
        for row in range(2):
            one, _ = model(alone(observation, row), suffix(model)[row : row + 1], "bidirectional")
            torch.testing.assert_close(one[0], hidden[row], rtol=1e-4, atol=1e-5)
            action = head.predict_action(alone(observation, row), noise[row : row + 1]).action
            torch.testing.assert_close(action[0], actions[row], rtol=1e-4, atol=1e-5)


def test_repeat_repeats_whole_batches(model: FlowVLA, observation: Observation) -> None:
    prefix = model.repeat(model.prefill(observation), 2)
    hidden, _ = model.extend(prefix, suffix(model).repeat(2, 1, 1), "bidirectional")
    once, _ = model(observation, suffix(model), "bidirectional")
    torch.testing.assert_close(hidden, once.repeat(2, 1, 1), rtol=1e-4, atol=1e-5)
    noise, time, _ = drawn()
    twice = model.velocity(prefix, noise.repeat(2, 1, 1), time.repeat(2))
    torch.testing.assert_close(twice[:2], twice[2:])


def test_cached_features_replace_images(model: FlowVLA, observation: Observation) -> None:
    features = model.encode_images(model.preprocess_images(observation.images["front"][:, 0]), "front")
    cached = Observation({}, observation.state, observation.instruction, {"front": features})
    torch.testing.assert_close(model.prefill(cached).hidden, model.prefill(observation).hidden)


def test_the_state_matters(model: FlowVLA, observation: Observation) -> None:
    other = replace(observation, state=observation.state + 1)
    noise, _, _ = drawn()
    head = flow_head(model)
    assert not torch.allclose(head.predict_action(observation, noise).action, head.predict_action(other, noise).action)
    torch.testing.assert_close(model.prefill(observation).plan[:, : published.STATE_DIM], observation.state[:, 0])


def test_several_cameras_follow_each_other(make: Callable[..., FlowVLA], observation: Observation) -> None:
    both, picture = make(cameras=["front", "wrist"]).eval(), observation.images["front"]
    prefix = both.prefill(replace(observation, images={"front": picture, "wrist": 255 - picture}))
    one = make().eval().prefill(observation)
    assert prefix.hidden.shape[1] - one.hidden.shape[1] == 4
    with pytest.raises(UserError, match=r"no camera \['wrist'\]; it has \['front'\].*dataset\.cameras"):
        both.prefill(observation)
    with pytest.raises(UserError, match=r"model\.cameras=\[\]; .* needs at least one camera"):
        make(cameras=[])


def test_a_padded_step_has_no_gradient(model: FlowVLA, observation: Observation) -> None:
    """LeRobot's own pi0 trains on padded steps."""
    _, _, action = drawn()
    action.requires_grad_(True)
    pad = torch.zeros(2, published.HORIZON, dtype=torch.bool)
    pad[0, 2:] = True
    head = flow_head(model)
    error = torch.zeros(())

    def masked_mean(value: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        nonlocal error
        error = value
        value.retain_grad()
        return FlowHead.masked_mean(head, value, valid)

    head.masked_mean = masked_mean
    head.compute_loss(Batch(observation, action, pad))[0].backward()
    gradient = error.grad.unflatten(0, (-1, 2))
    assert not gradient[:, 0, 2:].any()
    assert gradient[:, 0, :2].all()
    assert gradient[:, 1].all()


@pytest.mark.parametrize("use", ["expert", "language"])
def test_gradient_checkpointing_changes_no_gradient(
    make: Callable[..., FlowVLA], observation: Observation, use: str
) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = make(gradient_checkpointing=checkpointing).train()
        if use == "language":
            model(observation, suffix(model), "causal")[0].logsumexp(-1).sum().backward()
        else:
            noise, time, _ = drawn()
            model.velocity(model.prefill(observation), noise, time).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, again = gradients
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=name)
    for part in PARTS[: 4 if use == "expert" else 3]:
        assert any(model.part_of(name) == part for name in plain), part


def test_parts_and_landmarks(model: FlowVLA) -> None:
    parts = {model.part_of(name) for name, _ in model.named_parameters()}
    assert parts == set(PARTS)
    assert model.part("vision") is model.get_submodule(model.parts["vision"][0])
    for landmark in model.landmarks.values():
        assert model.part_of(landmark) == "language"
        assert isinstance(model.get_submodule(landmark), torch.nn.Module)
    everything, lora = Freeze(PARTS), Lora(rank=4, targets=["language.q_proj", "decoder"])
    freeze_parts(model, everything)
    add_adapter(model, lora, everything)
    adapted = {name.partition(".lora_")[0] for name, _ in model.named_parameters() if "lora_" in name}
    assert any(name.endswith("action_out_proj") for name in adapted)
    assert {model.part_of(name) for name in adapted} == {"language", "decoder"}


def test_adapters_at_their_start_change_nothing(model: FlowVLA, case: Case, observation: Observation) -> None:
    noise, _, _ = drawn()
    with torch.no_grad():
        before = flow_head(model).predict_action(observation, noise).action
        freeze_parts(model, Freeze(PARTS))
        add_adapter(model, Lora(rank=4, targets="all-linear"), Freeze(PARTS))
        torch.testing.assert_close(flow_head(model).predict_action(observation, noise).action, before)


def test_a_decoder_can_start_anew(model: FlowVLA, observation: Observation) -> None:
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.restart_decoder()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    decoder = {name for name in before if model.part_of(name) == "decoder"}
    assert changed == decoder == set(model.reinitialized)
    noise, _, _ = drawn()
    assert flow_head(model).predict_action(observation, noise).action.isfinite().all()
    freeze_parts(model, Freeze(PARTS))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == decoder


def test_bfloat16_is_for_layers(make: Callable[..., FlowVLA], case: Case, observation: Observation) -> None:
    model = make(dtype="bfloat16").eval()
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if model.part_of(name) == "vision"} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "q_proj" in name and model.part_of(name) != "vision"} == {
        torch.bfloat16
    }
    hidden, prefix = model(observation, suffix(model), "causal")
    assert hidden.dtype == prefix.hidden.dtype == torch.float32
    torch.testing.assert_close(hidden, case.ours(observation, suffix(model), "causal")[0], rtol=0.3, atol=0.3)
    noise, _, _ = drawn()
    close, wanted = (flow_head(m).predict_action(observation, noise).action for m in (model, case.ours))
    torch.testing.assert_close(close, wanted, rtol=0.3, atol=0.3)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_heads_refuse_what_the_expert_cannot(model: FlowVLA) -> None:
    with pytest.raises(UserError, match=r"head\.prediction=x1; the action expert of .* set head\.prediction=velocity"):
        flow_head(model, prediction="x1")
    model.action_dim = 5
    with pytest.raises(UserError, match=r"action has 7 dimensions, the action expert of .* takes 5; choose another"):
        flow_head(model)


def test_a_long_state_is_refused(make: Callable[..., FlowVLA]) -> None:
    with pytest.raises(UserError, match=r"the state has 40 dimensions, .* takes 32; choose fewer in dataset\.keys"):
        make(state_dim=40)
