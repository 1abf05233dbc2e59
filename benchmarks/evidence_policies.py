"""Criteria of the shipped base and of the first study: what pretraining gave, and what LoRA fine-tuning adds."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.criteria import Found, measures
from benchmarks.surroundings import ROOT

VLAEXP = ROOT / ".venv" / "bin" / "vlaexp"
HEADS = ("joint", "ee_delta", "discrete_token", "flow")
OUTPUTS = ROOT / "outputs" / "evidence"


def vlaexp(*arguments: str) -> None:
    subprocess.run([str(VLAEXP), *arguments, f"outputs={OUTPUTS}"], check=True, cwd=ROOT)


@measures()
def shipped_weights() -> Iterator[Found]:
    from vlaexp.model.tiny import SHIPPED

    size = sum(path.stat().st_size for path in SHIPPED.rglob("*.safetensors"))
    yield Found("shipped weights in MB", size / 1e6, "<= 10", 1)


@measures()
def base_in_small() -> Iterator[Found]:
    yield from base_success("ee_delta", episodes=60)


@measures(long=True)
def base_success_of_every_head() -> Iterator[Found]:
    for head in HEADS:
        yield from base_success(head, episodes=300)


def base_success(head: str, episodes: int) -> Iterator[Found]:
    """Success of the base as it ships on layouts never trained on, by family."""
    name = f"base_{head}_{episodes}"
    shutil.rmtree(OUTPUTS / name, ignore_errors=True)
    space = "joint" if head == "joint" else "ee_delta"
    chosen = [f"head={head}", f"action_space={space}", "env=tabletop", "eval=nominal", f"eval.episodes={episodes}"]
    subprocess.run([VLAEXP, "eval", "policy=base", *chosen, "tracker=csv", f"outputs={OUTPUTS / name}"], check=True)
    summary = json.loads(next((OUTPUTS / name).rglob("summary.json")).read_text())
    for family, rate in summary["success_by_family"].items():
        bound = ">= 0.9" if family == "pick" else ">= 0.8"
        yield Found(f"base, head={head}, {family}", rate, bound, summary["episodes_by_family"][family])


@measures(long=True)
def study_action_representations() -> Iterator[Found]:
    """The study of `make demo`, from nothing, and what its comparison says."""
    shutil.rmtree(OUTPUTS / "study", ignore_errors=True)
    began = time.monotonic()
    subprocess.run(
        [VLAEXP, "sweep", "experiment=action_representations", f"outputs={OUTPUTS / 'study'}"], check=True, cwd=ROOT
    )
    yield Found("make demo in seconds, set-up excluded", time.monotonic() - began, "<= 900", 1)
    yield from judge(OUTPUTS / "study" / "action_representations" / "comparison.json")


def judge(path: Path) -> Iterator[Found]:
    """The criteria of the study from its comparison."""
    rows = [row for row in json.loads(path.read_text())["rows"] if row["split"] == "nominal"]
    last = max(row["steps"] for row in rows)
    tuned = {row["head"]: row for row in rows if row["lora"] != "none" and row["steps"] == last}
    scratch = {row["head"]: row for row in rows if "scratch" in row["base"] and row["steps"] == last}
    zero = {row["head"]: row for row in rows if row["role"] == "base"}
    yield Found("heads compared after LoRA", len(tuned), ">= 4", len(rows))
    for head, row in tuned.items():
        yield Found(f"LoRA r16 on the new domain, head={head}", row["success_rate"], ">= 0.6", row["episodes"])
        yield Found(
            f"zero-shot on the new domain, head={head}", zero[head]["success_rate"], "<= 0.2999", row["episodes"]
        )
        yield Found(f"interval above zero-shot's, head={head}", gap(row, zero[head]), ">= 0", row["episodes"])
        yield Found(f"interval above from-scratch's, head={head}", gap(row, scratch[head]), ">= 0", row["episodes"])
    best = sorted((row["success_rate"] for row in tuned.values()), reverse=True)
    yield Found("second best head after LoRA", best[1], ">= 0.75", last)


def gap(above: dict[str, Any], below: dict[str, Any]) -> float:
    """Lower end of one interval minus upper end of another."""
    return above["ci_low"] - below["ci_high"]
