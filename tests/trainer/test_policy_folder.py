import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vlaexp
from vlaexp import manifest
from vlaexp.config import compose
from vlaexp.data_types import Observation
from vlaexp.dataset.normalize import NormStats
from vlaexp.errors import UserError
from vlaexp.head.base import Head
from vlaexp.trainer import policy_folder
from vlaexp.trainer.policy_folder import FILES, save_policy
from vlaexp.workflow.train import Parts, build, train


def observe(head: Head) -> Observation:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 1, 3, 16, 16), generator=generator, dtype=torch.uint8)
    state = torch.rand(2, 1, head.state_norm.centre.shape[-1], generator=generator)
    return Observation({"front": images}, state, ["pick up the red cube", "pick up the blue ball"])


def act(head: Head) -> torch.Tensor:
    head.reset([1, 2], [0, 1], [{}, {}])
    return head.act(observe(head)).action


def save(parts: Parts, folder: Path) -> Path:
    base = {"name": "tiny", "fingerprint": parts.head.model.weights_fingerprint()}
    return save_policy(folder, parts.head, parts.adapter, parts.config, {"base": base})


@pytest.mark.parametrize(
    "choice",
    [
        ["head=flow", "lora=r4"],
        ["head=discrete_token", "lora=none", "freeze=none"],
        ["head=joint", "lora=r4", "freeze=all", "lora.targets=[language,decoder]"],
        ["head=regression", "lora=none", "freeze=all"],
    ],
)
def test_loaded_policy_acts_the_same(tiny: list[str], tmp_path: Path, choice: list[str]) -> None:
    parts = build(compose("train", [*tiny, *choice]))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # as if trained
        for parameter in parts.head.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    folder = save(parts, tmp_path / "policy")
    loaded = vlaexp.load_policy(str(folder))
    assert not loaded.training
    assert loaded.spec == parts.head.spec
    assert torch.equal(act(loaded), act(parts.head.eval()))


def test_folder_holds_what_the_page_says(policy: Path) -> None:
    found = {path.name for path in policy.iterdir()}
    assert found == {*FILES, "adapter", "manifest.json"}
    assert manifest.verify(policy) == []


def test_base_weights_are_not_copied(policy: Path) -> None:
    names = load_file(policy / "head.safetensors")
    assert not [name for name in names if name.startswith(("model.vision", "model.projector", "model.language"))]
    assert all("lora_" in name for name in load_file(policy / "adapter" / "adapter_model.safetensors"))


@pytest.mark.parametrize("name", [*FILES, "manifest.json", "adapter"])
def test_missing_file_is_named(policy: Path, name: str) -> None:
    (policy / name).rename(policy.parent / "away")
    with pytest.raises(UserError) as caught:
        vlaexp.load_policy(policy)
    text = str(caught.value)
    assert name in text
    assert str(policy) in text
    assert "copy the whole folder" in text or "give a folder like" in text


@pytest.mark.parametrize(
    "name",
    ["head.safetensors", "adapter/adapter_model.safetensors", "config.yaml", "norm_stats.json", "action_spec.json"],
)
def test_truncated_file_is_named(policy: Path, name: str) -> None:
    content = (policy / name).read_bytes()
    (policy / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=rf"{name} changed since the manifest was written; copy the whole folder again"):
        vlaexp.load_policy(policy)


def edit(path: Path, change: Callable[[dict], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_edited_norm_stats_are_refused(policy: Path) -> None:
    def change(data: dict) -> None:
        data["quantities"]["action"]["mode"] = "q01_q99"

    edit(policy / "norm_stats.json", change)
    with pytest.raises(UserError, match=r"norm_stats\.json changed since .*train again"):
        vlaexp.load_policy(policy)


def test_damaged_manifest_is_named(policy: Path) -> None:
    (policy / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is damaged .*copy the policy folder again"):
        vlaexp.load_policy(policy)


def test_edited_manifest_is_refused(policy: Path) -> None:
    edit(policy / "manifest.json", lambda data: data["base"].update(fingerprint="0"))
    with pytest.raises(UserError, match=r"manifest\.json was changed after it was written.*use the original"):
        vlaexp.load_policy(policy)


def make_weights(parts: Parts, folder: Path) -> Path:
    """The base of `parts` as a folder of weights."""
    model, stats = parts.head.model, parts.head.norm_stats
    folder.mkdir()
    trunk = {name: value for name, value in model.state_dict().items() if not name.startswith("decoder.")}
    save_file(trunk, folder / "base.safetensors")
    NormStats({k: stats.quantities[k] for k in ("state", "goal")}, stats.units, "test").save(folder / "norm_stats.json")
    sizes = {key: parts.config["model"][key] for key in ("cameras", "image_size", "width")}
    seeds = {"state_dim": parts.demos.state_dim, "goal_dim": model.goal_dim, "training_seeds": [[0, 1]]}
    (folder / "config.json").write_text(json.dumps(sizes | seeds))
    return folder


def test_other_base_weights_are_refused(tiny: list[str], tmp_path: Path) -> None:
    weights = make_weights(build(compose("train", [*tiny, "lora=none"])), tmp_path / "weights")
    result = train(compose("train", [*tiny, "trainer.max_steps=1", f"model.weights={weights}"]))
    vlaexp.load_policy(result.milestones[1])
    tensors = load_file(weights / "base.safetensors")
    tensors["vision.norm.weight"] += 1e-3
    save_file(tensors, weights / "base.safetensors")
    with pytest.raises(
        UserError, match=r"was trained on base weights \w{12}\.\.\., this .* has .*use the same weights"
    ):
        vlaexp.load_policy(result.milestones[1])
    weights.rename(tmp_path / "away")
    with pytest.raises(UserError, match=rf"model\.weights={weights} is no folder of tiny weights"):
        vlaexp.load_policy(result.milestones[1])


def test_interrupted_saving_leaves_nothing_under_the_name(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = build(compose("train", [*tiny, "lora=r4"]))

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(policy_folder, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            save(parts, tmp_path / "step_000001")
    assert not (tmp_path / "step_000001").exists()
    assert act(vlaexp.load_policy(save(parts, tmp_path / "step_000001"))).isfinite().all()
    assert not list(tmp_path.glob("*.partial"))


def test_interrupted_saving_keeps_the_older_folder(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = build(compose("train", [*tiny, "lora=r4"]))
    folder = save(parts, tmp_path / "step_000001")
    before = manifest.hash_folder(folder, ["*", "adapter/*"])

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(policy_folder, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        save(parts, folder)
    assert manifest.hash_folder(folder, ["*", "adapter/*"]) == before
