"""What ships with the project is complete, small, what its manifest says, and works."""

from pathlib import Path

import pytest

from vlaexp import manifest
from vlaexp.config import compose
from vlaexp.model.tiny import SHIPPED
from vlaexp.workflow.evaluate import evaluate_verb
from vlaexp.workflow.train import build

HEADS = {"joint": "joint", "ee_delta": "ee_delta", "discrete_token": "ee_delta", "flow": "ee_delta"}


def test_they_are_small_and_match_their_manifest() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) <= 10e6
    assert manifest.verify(SHIPPED) == []


def test_their_page_has_the_measured_success_of_every_head() -> None:
    page = (SHIPPED / "README.md").read_text()
    measured = manifest.read(SHIPPED)["measured"]
    assert set(measured) == set(HEADS)
    for splits in measured.values():
        assert "nominal" in splits
        assert all(f"{100 * found['success_rate']:.1f}" in page for found in splits.values())


@pytest.mark.parametrize("head", HEADS)
def test_every_head_starts_from_its_own_decoder(head: str, small: list[str]) -> None:
    chosen = [f"head={head}", f"action_space={HEADS[head]}", "head.init=pretrained", "model.weights=shipped"]
    parts = build(compose("train", [*small, *chosen]))
    assert parts.head.model.weights == SHIPPED
    assert not parts.head.model.reinitialized
    assert "tabletop_pretrain" in parts.head.norm_stats.source


@pytest.mark.parametrize(
    "head", ["ee_delta", *(pytest.param(h, marks=pytest.mark.slow) for h in HEADS if h != "ee_delta")]
)
def test_the_base_picks_without_any_training(head: str, tmp_path: Path) -> None:
    chosen = [f"head={head}", f"action_space={HEADS[head]}", "policy=base", "env=tabletop_pick", "tracker=csv"]
    panel = ["eval=nominal", "eval.episodes=16", "eval.num_envs=8", "eval.workers=0", "eval.videos=0"]
    result = evaluate_verb(compose("eval", [*chosen, *panel, f"outputs={tmp_path}"]))
    assert result.summaries["nominal"]["successes"] >= 12
