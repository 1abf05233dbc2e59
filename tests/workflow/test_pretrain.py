"""The recipe of the tiny base model, shrunk to seconds, leaves a folder of weights that other verbs start from."""

from pathlib import Path

import pytest
import torch

from vlaexp import manifest
from vlaexp.config import compose
from vlaexp.env.tabletop.scene import COLOURS
from vlaexp.model.tiny import WORDS, tokenize
from vlaexp.workflow.evaluate import evaluate_verb
from vlaexp.workflow.pretrain import ground_unseen_words, pretrain
from vlaexp.workflow.train import train

pytestmark = pytest.mark.slow
SHORT = [
    "trainer.max_steps=2",
    "trainer.batch_size=4",
    "trainer.log_interval=1",
    "trainer.val_interval=2",
    "dataset.val_fraction=0.2",
    "tracker=csv",
]
DECODERS = ["joint_joint", "ee_delta_ee_delta", "discrete_token_ee_delta", "flow_ee_delta"]


def shrunk(outputs: Path):
    cfg = compose("pretrain", ["name=mini", f"outputs={outputs}"])
    cfg.record = [*cfg.record, "episodes=6", "workers=1"]
    cfg.trunk = [*cfg.trunk, *SHORT]
    cfg.decoder = [*cfg.decoder, *SHORT]
    cfg.eval = [*cfg.eval, "eval=nominal", "eval.episodes=1", "eval.num_envs=1", "eval.workers=0", "tracker=csv"]
    return cfg


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Outputs folder, and the folder of weights in it."""
    outputs = tmp_path_factory.mktemp("pretrain")
    return outputs, pretrain(shrunk(outputs))


def test_folder_of_weights(mini):
    outputs, folder = mini
    assert folder == outputs / "pretrain" / "mini"
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set(DECODERS)
    assert (folder / "base.safetensors").is_file()
    record = manifest.read(folder)
    assert {f"{name}/decoder.safetensors" for name in DECODERS} < set(record["files"])
    assert set(record["measured"]) == {"joint", "ee_delta", "discrete_token", "flow"}
    assert all(splits["nominal"]["episodes"] == 1 for splits in record["measured"].values())
    assert manifest.verify(folder) == []


def test_table_beside_the_weights(mini):
    page = (mini[1] / "README.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert rows[0] == "| head | nominal |"
    assert [row.split(" | ")[0] for row in rows[1:]] == ["| discrete_token", "| ee_delta", "| flow", "| joint"]
    assert "on 5 scripted demonstrations" in page
    assert "1 episodes per split and head" in page


def test_again_repeats_nothing(mini):
    outputs, folder = mini
    trained = {path: path.stat().st_mtime_ns for path in outputs.glob("runs/*/milestones/*/head.safetensors")}
    measured = {path: path.stat().st_mtime_ns for path in outputs.glob("runs/*/milestones/*/eval/*/summary.json")}
    page = (folder / "README.md").read_text()
    assert (len(trained), len(measured)) == (5, 4)
    pretrain(shrunk(outputs))
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    assert {path: path.stat().st_mtime_ns for path in measured} == measured
    assert len(list(outputs.glob("runs/*"))) == 5
    assert (folder / "README.md").read_text() == page
    assert manifest.verify(folder) == []


def test_weights_are_fine_tuned_and_act_by_themselves(mini, small, tmp_path):
    _, folder = mini
    weights = f"model.weights={folder}"
    made = train(compose("train", [*small, weights, "head=flow", "head.init=pretrained", "name=adapted"]))
    record = manifest.read(made.milestones[4])
    assert record["head_from"] == "shipped decoder"
    assert record["base"]["training_seeds"][0][0] == 0
    brief = ["eval=nominal", "eval.episodes=1", "eval.num_envs=1", "eval.workers=0", "eval.videos=0", "tracker=csv"]
    zero = evaluate_verb(
        compose("eval", [weights, "policy=base", "head=flow", "env=tabletop_pick", *brief, f"outputs={tmp_path}"])
    )
    assert zero.summaries["nominal"]["episodes"] == 1
    assert zero.folder.parent.name.startswith("zero_shot_flow-")


def test_only_words_that_no_instruction_held_start_from_the_unknown_one() -> None:
    rows = torch.arange(len(WORDS), dtype=torch.float32)[:, None].repeat(1, 3)
    instructions = [f"{verb} the {colour} cube" for verb in ("push", "lift") for colour in sorted(COLOURS)]
    grounded = ground_unseen_words(rows, instructions)
    told = {word for text in instructions for word in tokenize(text)}
    for i in range(2, len(WORDS)):
        assert torch.equal(grounded[i], rows[i] if i in told else rows[1]), WORDS[i]
