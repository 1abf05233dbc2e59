"""Checkpoints of LeRobot's policies: statistics in each of their layouts are read, and nothing is skipped."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot_checkpoints import statistics
from safetensors.torch import save_file

from vlaexp.errors import UserError
from vlaexp.model.lerobot_checkpoint import (
    NORMALIZERS,
    STATISTIC,
    Checkpoint,
    read_checkpoint,
    save_checkpoint,
    unpadded,
)

MODES = {"normalization_mapping": {"STATE": "MEAN_STD", "ACTION": "MIN_MAX"}}
FILE = "policy_preprocessor_step_5_normalizer_processor.safetensors"


def read(folder: Path, weights: dict[str, torch.Tensor], config: dict = MODES) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    save_file(weights | {"model.a.weight": torch.ones(2)}, folder / "model.safetensors")
    return read_checkpoint(folder, config)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("action.mean", (None, "action", "mean")),
        ("observation.state.q99", (None, "observation.state", "q99")),
        ("observation.images.front.std", (None, "observation.images.front", "std")),
        ("so100.buffer.action.mean", ("so100", "action", "mean")),
        ("normalize_inputs.buffer_observation_state.mean", (None, "observation_state", "mean")),
        ("unnormalize_outputs.buffer_action.std", (None, "action", "std")),
        ("normalize_targets.so100-blue_buffer_action.max", ("so100-blue", "action", "max")),
        ("normalize_inputs.so100_buffer_observation_state.min", ("so100", "observation_state", "min")),
    ],
)
def test_names_of_statistics(name: str, found: tuple[str | None, str, str]) -> None:
    match = STATISTIC.fullmatch(name)
    assert match is not None
    assert (match["dataset"], match["feature"], match["statistic"]) == found


@pytest.mark.parametrize("name", ["model.state_proj.weight", "model.norm.running_mean", "model.mean.bias"])
def test_weights_are_no_statistics(name: str) -> None:
    assert STATISTIC.fullmatch(name) is None


def test_statistics_beside_the_weights(tmp_path: Path) -> None:
    save_file(statistics() | {"index.count": torch.ones(1)}, tmp_path / FILE)
    found = read(tmp_path, {})
    assert set(found.weights) == {"model.a.weight"}
    stats = found.norm_stats("checkpoint")
    assert (stats.quantities["state"].mode, stats.quantities["action"].mode) == ("mean_std", "min_max")
    np.testing.assert_allclose(stats.quantities["state"].mean, np.arange(8) / 10, atol=1e-6)
    np.testing.assert_allclose(stats.quantities["action"].max, np.arange(7) / 10 + 3, atol=1e-6)
    assert stats.source == f"checkpoint of {tmp_path}"


def test_statistics_among_the_weights_by_dataset(tmp_path: Path) -> None:
    old = {
        f"normalize_{group}.{dataset}_buffer_{feature}.{name}": torch.full((size,), value + shift)
        for group, feature, size in (("inputs", "observation_state", 6), ("targets", "action", 6))
        for dataset, shift in (("so100", 0.0), ("so100-blue", 5.0))
        for name, value in (("mean", 1.0), ("std", 2.0))
    }
    found = read(tmp_path, old, {})
    assert set(found.old_statistics) == set(old)
    assert set(found.statistics) == {"so100", "so100-blue"}
    blue = found.norm_stats("so100-blue").quantities
    assert (blue["state"].mean[0], blue["action"].std[0]) == (6.0, 7.0)
    assert blue["action"].q01[0] == pytest.approx(6 - 2.326 * 7), "of a normal distribution, where there is none"
    with pytest.raises(UserError, match=r"statistics=so10 is not in .*available: so100, so100-blue; nearest: so100"):
        found.norm_stats("so10")


def test_statistics_that_cannot_be_used(tmp_path: Path) -> None:
    mean = {"action.mean": torch.zeros(3)}
    with pytest.raises(UserError, match=r"statistics of action in .* lack \['std'\].*set model\.statistics=null"):
        read(tmp_path, mean, {}).norm_stats("checkpoint")
    infinite = mean | {"action.std": torch.full((3,), torch.inf)}
    with pytest.raises(UserError, match=r"lack \['std'\], or hold no numbers"):
        read(tmp_path, infinite, {}).norm_stats("checkpoint")
    with pytest.raises(UserError, match=r"action in .* is normalized as IDENTITY; expected one of \['MEAN_STD'"):
        read(tmp_path, mean, {"normalization_mapping": {"ACTION": "IDENTITY"}}).norm_stats("checkpoint")
    save_file({"odd": torch.ones(1)}, tmp_path / FILE)
    with pytest.raises(UserError, match=r"normalizer_processor\.safetensors holds \['odd'\], which are no statistics"):
        read(tmp_path, {})


def openpi(folder: Path, asset: str, **given: object) -> Path:
    """Statistics as openpi's `normalize.save` writes them."""
    path = folder / "assets" / asset / "norm_stats.json"
    path.parent.mkdir(parents=True)
    rows = {"mean": [0.5] * 7, "std": [2.0] * 7, "q01": [-1.0] * 7, "q99": [4.0] * 7}
    path.write_text(json.dumps({"norm_stats": {"state": rows, "actions": rows | given}}))
    return path


def test_openpis_statistics_by_asset(tmp_path: Path) -> None:
    openpi(tmp_path, "physical-intelligence/libero", mean=[1.5] * 7)
    openpi(tmp_path, "trossen", q01=None, q99=None)
    found = read(tmp_path, {}, {})
    assert set(found.statistics) == {"physical-intelligence/libero", "trossen"}
    stats = found.norm_stats("physical-intelligence/libero").quantities
    assert (stats["state"].mean[0], stats["action"].mean[0], stats["action"].std[0]) == (0.5, 1.5, 2.0)
    assert stats["action"].q99[0] == 4.0
    assert stats["action"].mode == "mean_std"
    assert found.norm_stats("trossen").quantities["action"].q01[0] == pytest.approx(0.5 - 2.326 * 2)
    with pytest.raises(
        UserError, match=r"statistics=libero is not in .*available: physical-intelligence/libero, trossen"
    ):
        found.norm_stats("libero")


def test_openpis_statistics_of_padded_vectors(tmp_path: Path) -> None:
    padded = {name: [*range(7), *[fill] * 25] for name, fill in (("mean", 0.0), ("std", 1.0))}
    openpi(tmp_path, "trossen", **padded, q01=None, q99=None)
    whole = read(tmp_path, {}, {}).norm_stats("trossen")
    stats = unpadded(whole, 32, {"state": 7, "action": 5}).quantities
    assert stats["action"].mean.tolist() == [0, 1, 2, 3, 4]
    assert stats["action"].q99.shape == (5,)
    assert stats["state"].mean.shape == (7,)
    assert unpadded(whole, 32, {"state": 3, "action": None}).quantities["action"].mean.shape == (32,)
    assert unpadded(whole, 32, {"state": 3, "action": 5}).quantities["state"].mean.shape == (7,), "another robot's stay"


@pytest.mark.parametrize(
    "text", ["{", "{}", '{"norm_stats": {"state": [1]}}', '{"norm_stats": {"state": {"mean": "a"}}}']
)
def test_openpis_statistics_that_are_damaged(tmp_path: Path, text: str) -> None:
    openpi(tmp_path, "trossen").write_text(text)
    with pytest.raises(UserError, match=r"assets/trossen/norm_stats\.json is damaged .*as openpi writes them: copy it"):
        read(tmp_path, {}, {})


def test_statistics_of_weights_are_not_raised(tmp_path: Path) -> None:
    """As LeRobot and openpi, who divide by the deviation whatever it is."""
    openpi(tmp_path, "trossen", std=[1.0, 0.001, *[1.0] * 5])
    stats = read(tmp_path, {}, {}).norm_stats("trossen")
    assert float(stats.affine("action").scale[1]) == pytest.approx(0.001)


def test_what_is_beside_the_weights_is_saved_too(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    read(source, {})
    save_file(statistics(), source / FILE)
    (source / "config.json").write_text("{}")
    openpi(source, "trossen")
    target.mkdir()
    save_checkpoint(target, source, {"model.a.weight": torch.zeros(2)})
    assert {path.name for path in target.iterdir()} == {"config.json", FILE, "model.safetensors", "assets"}
    assert [path.name for path in target.glob(NORMALIZERS)] == [FILE]
    assert "trossen" in read_checkpoint(target, {}).statistics
    assert torch.equal(read_checkpoint(target, {}).weights["model.a.weight"], torch.zeros(2))
