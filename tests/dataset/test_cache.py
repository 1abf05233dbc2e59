"""A cache changes the speed of a training and nothing else, and is refused where it would."""

import json

import numpy as np
import pytest
import torch

from vlaexp.config import compose
from vlaexp.dataset.cache import cached_frames
from vlaexp.errors import UserError
from vlaexp.workflow.data import training_frames
from vlaexp.workflow.train import build


def loss_and_gradients(parts, mode, folder):
    """Loss of one batch in training mode and the gradients of everything trainable, with frames of `cache.mode`."""
    head, demos = parts.head, parts.demos
    config = parts.config | {"cache": {"mode": mode, "limit_gb": 1.0}}
    frames, cached = training_frames(config, demos, head.model, folder)
    batch = demos.chunks(demos.split.train, frames, head.n_obs_steps, cached).__getitems__([0, 3, 50, 77])
    head.train()
    head.zero_grad()
    torch.manual_seed(0)
    loss, _ = head.compute_loss(batch)
    loss.backward()
    return cached, loss.detach(), {name: p.grad.clone() for name, p in head.named_parameters() if p.grad is not None}


# ---- legality


@pytest.mark.parametrize("base", ["tiny", "openvla_7b"])
def test_caches_leave_loss_and_gradients_as_they_are(small, tmp_path, openvla_weights, base):
    weights = {"tiny": "null", "openvla_7b": openvla_weights}[base]
    keys = ["name=cache", "augmentation=none", "head=flow", f"model={base}", f"model.weights={weights}"]
    parts = build(compose("train", [*small, *keys]))
    seen = {
        mode: loss_and_gradients(parts, mode, tmp_path / "cache") for mode in ("none", "images", "features", "auto")
    }
    assert {mode: cached for mode, (cached, _, _) in seen.items()} == {
        "none": False,
        "images": False,
        "features": True,
        "auto": True,
    }
    _, loss, gradients = seen["none"]
    assert {name for name, p in parts.head.named_parameters() if p.requires_grad} >= set(gradients)
    assert any(gradient.abs().sum() > 0 for gradient in gradients.values())
    for mode in ("images", "features", "auto"):
        torch.testing.assert_close(seen[mode][1], loss)
        assert seen[mode][2].keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(seen[mode][2][name], gradient, msg=lambda text, n=name: f"{n}: {text}")


ILLEGAL = {
    "images are augmented": ["augmentation=colour_jitter"],
    "the vision part is trained": ["lora=none", "freeze=none"],
    "the vision part is trained (": ["lora.targets=[vision,language]"],
}


@pytest.mark.parametrize(("reason", "choice"), ILLEGAL.items())
def test_features_are_refused_when_asked_for_and_not_used_in_silence(small, tmp_path, reason, choice):
    parts = build(compose("train", [*small, "name=cache", "augmentation=none", *choice]))
    frames, cached = training_frames(parts.config, parts.demos, parts.head.model, tmp_path / "cache")
    assert not cached
    assert frames["front"][np.array([0])].dtype == np.uint8
    config = parts.config | {"cache": {"mode": "features", "limit_gb": 1.0}}
    with pytest.raises(UserError) as refusal:
        training_frames(config, parts.demos, parts.head.model, tmp_path / "cache")
    assert str(refusal.value).startswith(f"cache.mode=features is not legal here: {reason}")
    assert str(refusal.value).endswith("; use cache.mode=auto")


def test_other_vision_weights_have_another_cache(small, tmp_path):
    for seed in (0, 1):
        parts = build(compose("train", [*small, "name=cache", "augmentation=none", f"seed={seed}"]))
        training_frames(parts.config, parts.demos, parts.head.model, tmp_path / "cache")
        assert len(list((tmp_path / "cache").glob("*.npy"))) == seed + 1


def test_limits_and_modes(small, tmp_path):
    parts = build(compose("train", [*small, "name=cache", "augmentation=none"]))

    def frames(mode, limit_gb):
        config = parts.config | {"cache": {"mode": mode, "limit_gb": limit_gb}}
        return training_frames(config, parts.demos, parts.head.model, tmp_path / "cache")

    raw, cached = frames("auto", 1e-6)
    assert not cached
    assert not (tmp_path / "cache").exists()
    np.testing.assert_array_equal(raw["front"][np.array([3])], parts.demos.frames("front")[np.array([3])])
    with pytest.raises(
        UserError, match=r"the features of front cache would take .* GB, above the limit of 1e-06 GB; set"
    ):
        frames("features", 1e-6)
    with pytest.raises(UserError, match=r"unknown cache.mode 'feature'; available: .*; nearest: features"):
        frames("feature", 1.0)


# ---- files


class Counted:
    """Ten frames; counts how often it is read."""

    reads = 0

    def __getitem__(self, indices):
        self.reads += 1
        return np.asarray(indices, dtype=np.float32)[:, None] * np.ones((1, 3), np.float32)


@pytest.fixture
def source():
    return Counted()


@pytest.fixture
def cache(tmp_path, source):
    """Opens or builds the cache of `source` doubled."""

    def open_(num_frames=10, compute=lambda raw: 2 * raw, limit_gb=1.0, **key):
        return cached_frames(tmp_path, {"of": "numbers", **key}, source, num_frames, compute, limit_gb, "test")

    return open_


def test_a_cache_holds_what_is_computed_and_computes_it_once(cache, source):
    rows = np.array([7, 0, 7])
    np.testing.assert_array_equal(cache()[rows], 2 * source[rows])
    reads = source.reads
    np.testing.assert_array_equal(cache()[rows][:, 0], [14, 0, 14])
    assert source.reads == reads


def test_another_key_is_another_cache(cache):
    cache()
    assert cache(compute=lambda raw: 3 * raw, weights="others")[np.array([1])][0, 0] == 3


def test_an_interrupted_build_leaves_no_cache(cache, tmp_path):
    def fail(raw):
        if len(raw) > 1:
            raise KeyboardInterrupt
        return raw

    with pytest.raises(KeyboardInterrupt):
        cache(compute=fail)
    assert not list(tmp_path.glob("*.npy"))
    assert cache()[np.array([4])][0, 0] == 8


def test_a_cache_above_the_limit_is_refused_and_the_limit_that_would_do_is_named(cache, tmp_path):
    with pytest.raises(
        UserError, match=r"the test cache would take .* set cache.limit_gb=.* or cache.mode=none to dec"
    ):
        cache(limit_gb=1e-9)
    assert not list(tmp_path.iterdir())


def test_a_stale_cache_is_an_error(cache):
    cache()
    with pytest.raises(UserError, match=r"cache .*npy is stale: it has shape \(10, 3\); delete it and run again"):
        cache(num_frames=11)


@pytest.mark.parametrize("damage", ["truncated", "empty", "no header", "bad header", "header of nothing"])
def test_a_damaged_cache_is_an_error(cache, tmp_path, damage):
    cache()
    (path,) = tmp_path.glob("*.npy")
    header = path.with_suffix(".json")
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "no header":
        header.unlink()
    else:
        header.write_text("{" if damage == "bad header" else json.dumps({}))
    with pytest.raises(UserError, match=r"cache .*npy is damaged \(.*\); delete it and run again"):
        cache()
