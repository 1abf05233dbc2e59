"""Packed trainings equal the same trainings alone, bit for bit, and share what is frozen."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlaexp.config import compose
from vlaexp.errors import UserError
from vlaexp.trainer.journal import Row, read_journal
from vlaexp.workflow.packed import Pack, train_packed
from vlaexp.workflow.train import TrainResult, build, train

ELSEWHERE = ("runtime", "files", "sha256", "git")  # what of a manifest tells time and place
SIZES = ["model.image_size=16", "model.width=32", "model.depth=1", "model.decoder_depth=1"]


@pytest.fixture
def apart(outputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second outputs folder that sees the same dataset."""
    other = tmp_path_factory.mktemp("apart")
    (other / "datasets").symlink_to(outputs / "datasets")
    return other


def policy(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Every tensor of a policy folder, and its manifest without times."""
    found = load_file(folder / "head.safetensors")
    if (folder / "adapter").is_dir():
        found |= load_file(folder / "adapter" / "adapter_model.safetensors")
    record = json.loads((folder / "manifest.json").read_text())
    del record["config"]["outputs"], record["config"]["tracker"], record["config"]["dataset"]
    return found, {key: value for key, value in record.items() if key not in ELSEWHERE}


def journal(run: Path, left_out: Sequence[str]) -> list[Row]:
    rows = [
        (step, {key: value for key, value in values.items() if not any(word in key for word in left_out)})
        for step, values in read_journal(run)
    ]
    return [row for row in rows if row[1]]


def assert_equal(packed: object, alone: TrainResult, left_out: Sequence[str] = ()) -> None:
    assert isinstance(packed, TrainResult), packed
    assert packed.run.name == alone.run.name
    assert journal(packed.run, ("latency", *left_out)) == journal(alone.run, ("latency", *left_out))
    assert packed.held_out == alone.held_out
    assert packed.milestones.keys() == alone.milestones.keys()
    for step, folder in alone.milestones.items():
        (mine, record), (theirs, their_record) = policy(packed.milestones[step]), policy(folder)
        assert record == their_record
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert torch.equal(mine[name], theirs[name]), name


@pytest.fixture
def tiny(small: list[str]) -> list[str]:
    """The shrunk training on a model of the smallest sizes."""
    torch.set_num_threads(1)
    return [*small, *SIZES]


@pytest.mark.parametrize(
    "choices",
    [
        [["lora=r4"], ["lora=r8", "augmentation=none", "trainer.max_steps=3", "trainer.milestones=[2]"]],
        [["head=joint", "augmentation=none"], ["head=flow", "augmentation=none"]],
        [["head=discrete_token", "lora.dropout=0.1", "trainer.num_workers=1"], ["freeze=vision", "lora=none"]],
    ],
)
def test_packed_equals_alone(tiny: list[str], apart: Path, choices: list[list[str]]) -> None:
    together = train_packed([compose("train", [*tiny, *choice]) for choice in choices])
    for packed, choice in zip(together, choices, strict=True):
        assert_equal(packed, train(compose("train", [*tiny, *choice, f"outputs={apart}"])))


def test_a_resumed_training_in_a_pack_equals_a_straight_one_alone(tiny: list[str], apart: Path) -> None:
    """The first slot was trained to step 2 before, alone; the second is new."""
    train(compose("train", [*tiny, "lora=r4", "trainer.max_steps=2"]))
    choices = ["lora=r4", "lora=r8"]
    together = train_packed([compose("train", [*tiny, choice]) for choice in choices])
    for packed, choice in zip(together, choices, strict=True):
        # the half was a finished run, whose held-out error stays in the journal
        assert_equal(packed, train(compose("train", [*tiny, choice, f"outputs={apart}"])), ("held_out/",))


@pytest.mark.slow
def test_packed_is_evaluated_and_logged_as_alone(tiny: list[str], brief: list[str], apart: Path) -> None:
    choices = [["lora=r4", "trainer.milestones=[2]"], ["lora=r8", "tracker=mlflow"]]
    together = train_packed([compose("train", [*tiny, *brief, *choice]) for choice in choices])
    for packed, choice in zip(together, choices, strict=True):
        alone = train(compose("train", [*tiny, *brief, *choice, f"outputs={apart}"]))
        assert_equal(packed, alone)
        rates = [
            {step: found.summaries["nominal"]["success_rate"] for step, found in result.evaluation.items()}
            for result in (packed, alone)
        ]
        assert rates[0] == rates[1]
    assert train_packed([compose("train", [*tiny, *brief, *choice]) for choice in choices]) == together


def test_one_failing_training_does_not_stop_the_others(tiny: list[str], apart: Path) -> None:
    """One cannot be built; one fails at its second step, where a file is in the way of its policy folder."""
    choices = ["lora=r4", "lora=r4 lora.targets=[langage]", "lora=r8 trainer.milestones=[2]"]
    cfgs = [compose("train", [*tiny, *choice.split()]) for choice in choices]
    run = build(cfgs[2]).run
    run.mkdir(parents=True)
    (run / "milestones").touch()
    fine, unbuilt, broken = train_packed(cfgs)
    assert_equal(fine, train(compose("train", [*tiny, "lora=r4", f"outputs={apart}"])))
    with pytest.raises(UserError, match=r"unknown part 'langage' in lora.targets"):
        raise unbuilt
    with pytest.raises(OSError, match="milestones"):
        raise broken
    assert max(step for step, _ in read_journal(run)) == 2
    (run / "milestones").unlink()
    (again,) = train_packed([cfgs[2]])  # its lock was given back
    assert_equal(again, train(compose("train", [*tiny, *choices[2].split(), f"outputs={apart}"])))


def test_what_is_frozen_and_the_data_are_held_once(tiny: list[str]) -> None:
    tiny = [*tiny, "augmentation=none"]
    pack = Pack()
    with ExitStack() as stack:
        choices = (["lora=r4"], ["lora=r8", "freeze=all"], ["head=flow"])
        slots = [pack.open(compose("train", [*tiny, *choice]), 3, stack) for choice in choices]
        trainings = [slot.training for slot in slots]
        heads = [training.parts.head for training in trainings]
        first, second, third = (
            {name.replace(".base_layer", ""): value for name, value in head.named_parameters()} for head in heads
        )
        for name, parameter in first.items():
            if name.startswith(("model.vision", "model.projector", "model.language")) and "lora_" not in name:
                assert parameter.data_ptr() == second[name].data_ptr() == third[name].data_ptr(), name
        own = [{p.data_ptr() for p in head.parameters() if p.requires_grad} for head in heads]
        assert sum(map(len, own)) == len(set().union(*own))
        frozen = {p.data_ptr() for head in heads for p in head.parameters() if not p.requires_grad}
        assert not frozen & set().union(*own)
        for other in trainings[1:]:
            assert other.parts.demos is trainings[0].parts.demos
            assert other.data.frames["front"] is trainings[0].data.frames["front"]
            assert other.data.cached_features
        with pytest.raises(UserError, match=r"the pack has the run .* twice; ask for each once, with all its miles"):
            pack.open(compose("train", [*tiny, "lora=r4", "trainer.max_steps=3"]), 3, stack)


def test_shared_weights_are_the_same_after_training(tiny: list[str], apart: Path) -> None:
    """Heads that start from shipped decoders, restart them or freeze them write to none of the others' weights."""
    shipped = [key for key in tiny if not key.startswith("model.")] + ["augmentation=none"]
    choices = [["head=flow", "freeze=all"], ["head=ee_delta", "freeze=all"], ["head=ee_delta", "head.init=scratch"]]
    together = train_packed([compose("train", [*shipped, *choice]) for choice in choices])
    for packed, choice in zip(together, choices, strict=True):
        assert_equal(packed, train(compose("train", [*shipped, *choice, f"outputs={apart}"])))


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ("model.width=32", "model.width=64", r"training 0 of the pack has model.width=32, training 1 64; a pack"),
        ("seed=0", "seed=1", r"has seed=0, training 1 1; .* they agree in model, seed, trainer.accelerator"),
        ("model=tiny", "model=smolvla", r"of the pack has model\.\S+=.*: train them apart"),
        ("trainer.precision=32-true", "trainer.precision=bf16-mixed", r"trainer.precision=32-true, training 1 bf16-mi"),
        ("trainer.num_threads=1", "trainer.num_threads=2", r"has trainer.num_threads=1, training 1 2"),
        ("lora=r4", "trainer.devices=2", r"training 1 .* trainer.devices=2 trainer.strategy=auto; .* on one device"),
        ("trainer.strategy=ddp", "lora=r8", r"training 0 .* trainer.devices=1 trainer.strategy=ddp; packed"),
        ("trainer.precision=bf16-true", "trainer.precision=bf16-true", r"bf16-true, which gives .* one of \['32-true'"),
        ("lora=r4", "lora=none freeze=none", r"training 1 .* freeze=none: it trains every weight and so share"),
    ],
)
def test_what_cannot_be_packed(outputs: Path, one: str, other: str, message: str) -> None:
    common = ["trainer=cpu", f"outputs={outputs}"]
    with pytest.raises(UserError, match=message):
        train_packed([compose("train", [*common, *choice.split()]) for choice in (one, other)])
    assert not (outputs / "runs").exists()


def test_a_training_that_needs_another_base_is_told_so(small: list[str]) -> None:
    """LeRobot's policies hold their own decoder, as wide as the action."""
    settings = "{dim_model: 32, n_heads: 2, dim_feedforward: 32, n_encoder_layers: 1, n_vae_encoder_layers: 1, "
    act = ["model=lerobot", f"model.settings={settings}pretrained_backbone_weights: null}}", "model.image_size=[32,32]"]
    keys = [*(key for key in small if "weights" not in key), *act, "head=native", "lora=none", "freeze=vision"]
    keys += ["trainer.max_steps=1", "trainer.batch_size=2", "augmentation=none"]
    spaces = ("joint", "ee_delta")
    one, other = train_packed([compose("train", [*keys, f"action_space={space}"]) for space in spaces])
    assert isinstance(one, TrainResult)
    with pytest.raises(UserError, match=r"a pack has one base: its own has .*'action_dim': 8.*need .*'action_dim': 7"):
        raise other
