"""Evaluate a policy on the splits of a panel and leave the evidence in a folder.

    <folder>/<split>/summary.json      rates with intervals, smoothness, latency, the request that they answer
    <folder>/<split>/episodes.parquet  one row per episode
    <folder>/<split>/traces.parquet    one row per executed action
    <folder>/<split>/videos/*.mp4      a few episodes, as the policy saw them

A split whose summary answers the same request is not run again.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra.utils import instantiate
from omegaconf import OmegaConf

from vlaexp.config import resolved
from vlaexp.data_types import Policy
from vlaexp.env.vector import VectorEnv
from vlaexp.errors import UserError
from vlaexp.eval.rollout import Progress, Rollout, latency_ms, run_episodes, stack
from vlaexp.eval.split import EvalSplit, Panel
from vlaexp.eval.statistics import wilson_interval
from vlaexp.eval.video import write_video

SUMMARY = "summary.json"


def evaluate(
    policy: Policy,
    env: Mapping[str, Any],
    panel: Panel,
    folder: Path,
    label: str,
    policy_key: str,
    on_split: Callable[[str, dict[str, Any]], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Run every split of `panel`; returns the summaries by split.

    Args:
        policy: what is evaluated.
        env: configuration of the domain's environment.
        panel: splits and sizes.
        folder: where the evidence goes.
        label: for progress lines.
        policy_key: identity of the policy; part of the request that a summary answers.
        on_split: called after each split.

    Raises:
        UserError: where a split changes something that the environment does not have.
    """
    for name, split in panel.splits.items():
        if foreign := sorted(set(split.env) - set(env)):
            raise UserError(
                f"split {name} changes {foreign} of the environment, but {env['_target_']} has {sorted(env)}; choose "
                "splits for this environment (eval=nominal fits all, eval=pusht is for env=pusht)"
            )
    summaries = {}
    for name, split in panel.splits.items():
        changed = resolved(OmegaConf.merge(dict(env), dict(split.env)))
        request = {
            "policy": policy_key,
            "env": changed,
            "first_seed": panel.first_seed,
            "episodes": panel.episodes,
            "n_action_steps": policy.n_action_steps,
            "num_envs": panel.num_envs,
        }
        summary = read_summary(folder / name)
        if summary is None or summary["request"] != json.loads(json.dumps(request)):
            summary = _run_split(policy, changed, split, panel, folder / name, f"{label} {name}", request)
        summaries[name] = summary
        if on_split is not None:
            on_split(name, summary)
    return summaries


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a finished split, or None."""
    path = folder / SUMMARY
    return json.loads(path.read_text()) if path.exists() else None


def _run_split(
    policy: Policy,
    env: dict[str, Any],
    split: EvalSplit,
    panel: Panel,
    folder: Path,
    label: str,
    request: dict[str, Any],
) -> dict[str, Any]:
    partial_folder = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    make_env = partial(instantiate, OmegaConf.create(env), _convert_="all")
    with VectorEnv(make_env, min(panel.num_envs, panel.episodes), panel.workers) as envs:
        fps = envs.fps
        progress = Progress(label, panel.episodes)
        rollouts = run_episodes(policy, envs, panel.seeds, panel.videos, progress)
        envs.reset({0: panel.first_seed})
        latency = latency_ms(policy, stack([[envs.observe([0])[0]] * policy.n_obs_steps]), rollouts[0].scene)
    summary = summarize(rollouts) | latency | {"question": split.question, "fps": fps, "request": request}
    _episode_table(rollouts).to_parquet(partial_folder / "episodes.parquet", index=False)
    _trace_table(rollouts).to_parquet(partial_folder / "traces.parquet", index=False)
    for rollout in rollouts[: panel.videos]:
        outcome = "success" if rollout.metrics["success"] else "failure"
        path = partial_folder / "videos" / f"seed_{rollout.seed}_{outcome}.mp4"
        write_video(
            path, [np.concatenate(list(images.values()), 1) for images in rollout.film], fps / policy.n_action_steps
        )
    (partial_folder / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial_folder.rename(folder)
    return summary


def summarize(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Rates and means over episodes, None where not measured; `outcomes` keeps the order of seeds for pairing."""
    outcomes = [bool(rollout.metrics["success"]) for rollout in rollouts]
    low, high = wilson_interval(sum(outcomes), len(outcomes))

    def mean(key: str) -> float | None:
        values = [rollout.metrics[key] for rollout in rollouts]
        return None if None in values else float(np.mean(values))

    families: dict[str, list[bool]] = {}
    for rollout, outcome in zip(rollouts, outcomes, strict=True):
        families.setdefault(str(rollout.scene.get("family", "task")), []).append(outcome)
    return {
        "episodes": len(outcomes),
        "successes": sum(outcomes),
        "success_rate": sum(outcomes) / len(outcomes),
        "ci_low": low,
        "ci_high": high,
        "success_by_family": {name: sum(hits) / len(hits) for name, hits in sorted(families.items())},
        "episodes_by_family": {name: len(hits) for name, hits in sorted(families.items())},
        "mean_steps": mean("steps"),
        "mean_squared_jerk": mean("mean_squared_jerk"),
        "seam_jump_mm": mean("seam_jump_mm"),
        "unreachable_per_episode": mean("unreachable"),
        "measures": {name: float(np.mean([r.measures[name] for r in rollouts])) for name in rollouts[0].measures},
        "outcomes": outcomes,
    }


def _episode_table(rollouts: Sequence[Rollout]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "seed": rollout.seed,
                "instruction": rollout.instruction,
                **rollout.metrics,
                **rollout.measures,
                "scene": json.dumps(rollout.scene),
            }
            for rollout in rollouts
        ]
    )


def _trace_table(rollouts: Sequence[Rollout]) -> pd.DataFrame:
    rows = [{"seed": rollout.seed, **row, **row["measures"]} for rollout in rollouts for row in rollout.trace]
    table = pd.DataFrame(rows).drop(columns="measures")
    if "object_positions" in table:
        table["object_positions"] = table["object_positions"].map(json.dumps)
    return table
