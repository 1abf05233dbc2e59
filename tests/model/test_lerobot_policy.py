"""Policies of LeRobot as base models: configuration, parts, adapters, published weights, error texts."""

from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlaexp.data_types import Observation
from vlaexp.errors import UserError
from vlaexp.ledger import ledger
from vlaexp.lora import Freeze, Lora, add_adapter, freeze_parts
from vlaexp.model.lerobot import LeRobotPolicy, check_loaded, explained

ACT: dict[str, Any] = {
    "dim_model": 32,
    "n_heads": 2,
    "dim_feedforward": 32,
    "n_encoder_layers": 1,
    "n_vae_encoder_layers": 1,
    "pretrained_backbone_weights": None,
}
UNET: dict[str, Any] = {"down_dims": [8, 16], "n_groups": 4, "pretrained_backbone_weights": None}


def make(policy: str = "act", settings: dict[str, Any] = ACT, **changes: Any) -> LeRobotPolicy:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"cameras": ["front"], "state_dim": 8, "action_dim": 7, "action_horizon": 6}
    return LeRobotPolicy(policy, settings=settings, **({"image_size": [48, 64]} | sizes | changes))


def observation(cameras: tuple[str, ...] = ("front",)) -> Observation:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 1, 3, 40, 40)
    images = {name: torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8) for name in cameras}
    return Observation(images, torch.randn(2, 1, 8, generator=generator), ["pick", "place"])


def training_batch(model: LeRobotPolicy) -> dict[str, Any]:
    is_pad = torch.zeros(2, 6, dtype=torch.bool)
    return model.inputs(observation()) | {"action": torch.randn(2, 6, 7), "action_is_pad": is_pad}


# ---- configuration


def test_what_vlaexp_knows_goes_into_the_configuration() -> None:
    config: Any = make().config
    assert (config.chunk_size, config.n_action_steps) == (6, 6)
    assert config.dim_model == 32
    assert config.image_features["observation.images.front"].shape == (3, 48, 64)
    assert config.robot_state_feature.shape == (8,)
    assert config.action_feature.shape == (7,)


def test_inputs_are_lerobots_batch() -> None:
    batch = make(cameras=["front", "wrist"]).inputs(observation(("front", "wrist")))
    assert set(batch) == {"observation.images.front", "observation.images.wrist", "observation.state", "task"}
    image = batch["observation.images.front"]
    assert image.shape == (2, 3, 48, 64)
    assert image.dtype == torch.float32
    assert 0 <= image.min() < image.max() <= 1
    assert (image[..., :8] == 0).all()  # padded, aspect kept
    assert batch["observation.state"].shape == (2, 8)


def test_preprocessing_images_twice_changes_nothing() -> None:
    model, image = make(), observation().images["front"][:, 0]
    once = model.preprocess_images(image)
    assert torch.equal(model.preprocess_images(once), once)


@pytest.mark.parametrize(
    ("policy", "settings", "text"),
    [
        ("ackt", {}, r"unknown model\.policy 'ackt'; available: act, .*nearest: act"),
        ("act", {"dim_modl": 3}, r"model\.settings has 'dim_modl', which ACTConfig lacks; .*nearest: dim_model"),
        ("act", {"chunk_size": 3}, r"model\.settings\.chunk_size is set by action_horizon; remove it"),
        ("act", {"dim_model": "wide"}, r"ACTConfig refuses .*dim_model.*into an int.*correct model\.settings"),
        ("act", {"n_obs_steps": 2}, r"ACTConfig refuses .*Multiple observation steps not handled"),
        (
            "diffusion",
            {},
            r"action_horizon=6 .* trajectories of 7 steps .* halve 3 times; set action_horizon=7, or fewer",
        ),
        ("diffusion", UNET, r"trajectories of 7 steps .*cannot halve 2 times; set action_horizon=3 or 7"),
        ("tdmpc", {}, r"model\.policy=tdmpc cannot be trained here: it plans by a world model .*rewards; choose act"),
        ("vqbet", {"action_chunk_size": 3}, r"model\.settings\.action_chunk_size is set by action_horizon; remove it"),
        (
            "vla_jepa",
            {},
            r"cannot be trained here: it learns from images of the steps \[0, .* 7\] \(num_video_frames=8\)",
        ),
        ("fastwam", {}, r"images of the steps \[0, 4, .* 32\] \(num_video_frames=33, action_video_freq_ratio=4\), and"),
        (
            "lingbot_va",
            {},
            r"of the steps \[0, .* 15\] \(frame_chunk_size=4, action_per_frame=4\), and batches hold no",
        ),
        ("smolvla", {}, r"smolvla needs files .*download vlm_model_name=HuggingFaceTB/SmolVLM2.*HF_HUB_CACHE=.*local"),
        ("wall_x", {}, r"wall_x needs a package that is not installed: .*pip install 'lerobot\[wallx\]'"),
    ],
)
def test_errors_say_what_to_do(policy: str, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        make(policy, settings)


def test_a_missing_camera_is_named() -> None:
    with pytest.raises(UserError, match=r"has no camera 'front'; it has \['wrist'\]; map names in dataset\.cameras"):
        make().inputs(observation(("wrist",)))


# ---- parts, freezing, adapters


def test_parts_of_the_policy() -> None:
    model = make()
    parts = {name: model.part_of(name) for name, _ in model.named_parameters()}
    assert {part for name, part in parts.items() if ".backbone." in name} == {"vision"}
    assert parts["policy.model.encoder_img_feat_input_proj.weight"] == "projector"
    assert parts["policy.model.action_head.weight"] == "decoder"
    smolvla = "policy.model.vlm_with_expert."
    assert model.part_of(f"{smolvla}vlm.model.vision_model.encoder.weight") == "vision"
    assert model.part_of(f"{smolvla}vlm.model.connector.modality_projection.weight") == "projector"
    assert model.part_of(f"{smolvla}vlm.model.text_model.layers.0.weight") == "language"
    assert model.part_of(f"{smolvla}lm_expert.layers.0.weight") == "decoder"


def test_ledger_counts_every_parameter_once_and_freezing_follows_the_parts() -> None:
    model = make()
    freeze_parts(model, Freeze(["vision"]))
    table = ledger(model, [], Lora(0))
    assert table.total == sum(parameter.numel() for parameter in model.parameters())
    assert table.by_part["vision"]["trainable"] == 0
    assert table.by_part["decoder"]["trainable"] == table.by_part["decoder"]["parameters"] > 0


def test_every_adapter_gets_a_gradient() -> None:
    """The output projection of attention is left out: `nn.MultiheadAttention` reads its weight past an adapter."""
    model, lora, freeze = make(), Lora(2, targets=["projector", "decoder"]), Freeze(["vision", "projector", "decoder"])
    freeze_parts(model, freeze)
    add_adapter(model, lora, freeze)
    model.train()
    adapters = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    assert adapters
    assert {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name} == set()
    batch = training_batch(model)
    model.loss(batch, batch["action_is_pad"])[0].backward()
    assert [name for name, p in adapters.items() if p.grad is None or not p.grad.abs().any()] == []


def test_frozen_batch_normalization_keeps_its_statistics() -> None:
    pytest.importorskip("diffusers")
    model = make("diffusion", UNET, action_horizon=7)
    freeze_parts(model, Freeze(["vision"]))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
    seen = torch.rand(2, 2, 3, 48, 64)
    batch = {"observation.images.front": seen, "observation.state": torch.rand(2, 2, 8), "action": torch.rand(2, 8, 7)}
    is_pad = torch.zeros(2, 8, dtype=torch.bool)
    model.loss(batch | {"action_is_pad": is_pad}, is_pad)
    assert before
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


# ---- weights


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint in LeRobot's format, of another seed than `make`'s."""
    model = make()
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.policy.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_saved_weights_are_loaded_with_their_configuration(saved: Path) -> None:
    model = make(settings={}, image_size=None, weights=str(saved))
    held = load_file(saved / "model.safetensors")
    assert all(torch.equal(value, held[name]) for name, value in model.policy.state_dict().items())
    assert model.image_size == (48, 64)
    assert model.config.dim_model == 32  # type: ignore[attr-defined]
    assert model.weights_fingerprint() != make().weights_fingerprint()
    assert model.weights_fingerprint() == make(settings={}, weights=str(saved)).weights_fingerprint()


@pytest.mark.parametrize("change", ["lacking", "unknown", "shape"])
def test_weights_that_do_not_fit_are_refused(saved: Path, change: str) -> None:
    tensors = load_file(saved / "model.safetensors")
    if change == "lacking":
        del tensors["model.action_head.weight"]
    if change == "unknown":
        tensors["model.other.weight"] = torch.zeros(2)
    save_file(tensors, saved / "model.safetensors")
    action_dim = 5 if change == "shape" else 7
    with pytest.raises(
        UserError, match=r"(?s)cannot be built from model\.weights=.*(action_head|other).*belong together"
    ):
        make(settings={}, weights=str(saved), action_dim=action_dim)


def test_weights_left_random_in_silence_are_found(saved: Path) -> None:
    policy = make(settings={}, weights=str(saved)).policy
    check_loaded(policy, saved / "model.safetensors")
    torch.nn.init.normal_(policy.model.action_head.weight)  # type: ignore[union-attr, arg-type]
    with pytest.raises(
        UserError, match=r"not loaded \['model\.action_head\.weight'\] \(1\); left random \['model\.act"
    ):
        check_loaded(policy, saved / "model.safetensors")


def test_weights_of_another_policy_are_refused(saved: Path) -> None:
    with pytest.raises(UserError, match=r"holds a act, not model\.policy=diffusion; set model\.policy"):
        make("diffusion", UNET, weights=str(saved), action_horizon=7)


@pytest.mark.parametrize(
    ("file", "content", "text"),
    [
        ("config.json", "{", r"config\.json of model\.weights=.* is damaged, .*expected type 'act': copy it again"),
        (
            "config.json",
            '{"model_type": "openvla"}',
            r"of no policy of LeRobot \(Missing 'type' field.*expected type 'act'",
        ),
        ("config.json", '{"type": "none"}', r"Policy type 'none' .*not registered\.\); expected type 'act'"),
        ("model.safetensors", None, r"saved is damaged \(.*copy or train it again"),
    ],
)
def test_damaged_files_are_named(saved: Path, file: str, content: str | None, text: str) -> None:
    path = saved / file
    path.write_bytes(path.read_bytes()[:-100] if content is None else content.encode())
    with pytest.raises(UserError, match=text):
        make(settings={}, weights=str(saved))


@pytest.mark.parametrize("there", ["pytorch_model.bin", "model-00001-of-00002.safetensors"])
def test_weights_in_another_form_are_not_opened(saved: Path, there: str) -> None:
    (saved / "model.safetensors").rename(saved / there)
    with pytest.raises(UserError, match=rf"has no model\.safetensors, the one file .*'{there}'.*pickles can run code"):
        make(settings={}, weights=str(saved))


def test_weights_that_are_not_here_are_named() -> None:
    with pytest.raises(
        UserError, match=r"(?s)model\.weights=nobody/nothing is neither a folder .*`hf download nobody/nothing`"
    ):
        make(weights="nobody/nothing")


def test_a_backbone_that_cannot_be_downloaded_is_named() -> None:
    with (
        pytest.raises(UserError, match=r"ImageNet weights .*\(no network\); put .*pretrained_backbone_weights: null"),
        explained("act"),
    ):
        raise URLError("no network")
