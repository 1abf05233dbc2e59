"""Evaluated policies, from folders or from an MLflow experiment, as rows: one per policy, milestone and split."""

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vlaexp.errors import UserError
from vlaexp.eval.panel import SUMMARY
from vlaexp.trainer.tracking import mlflow_client

DESCRIPTOR = "policy.json"  # in an evidence folder: who was evaluated

Row = dict[str, Any]


def collect_folders(paths: Sequence[Path]) -> list[Row]:
    """Rows of every evaluated policy at or below `paths` (run folders, policy folders, or a folder of them).

    Raises:
        UserError: where a path does not exist or nothing below it was evaluated.
    """
    rows: list[Row] = []
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is not a folder; give run folders, policy folders or a folder that holds them")
        found = [row for file in sorted(path.rglob(DESCRIPTOR)) for row in evidence_rows(file.parent)]
        if not found:
            raise UserError(
                f"nothing under {path} was evaluated; run `vlaexp eval policy.path={path} eval=panel` first"
            )
        rows += found
    return _unique(rows)


def collect_mlflow(uri: str, experiment: str) -> list[Row]:
    """Rows from the evidence that runs of an MLflow experiment keep as artifacts."""
    client = mlflow_client(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        names = sorted(item.name for item in client.search_experiments())
        raise UserError(f"MLflow store {uri} has no experiment {experiment!r}; it has {names}; set tracker.experiment")
    rows: list[Row] = []
    for run in client.search_runs([found.experiment_id], max_results=10_000):
        if not client.list_artifacts(run.info.run_id, "eval"):
            continue
        with tempfile.TemporaryDirectory() as folder:
            client.download_artifacts(run.info.run_id, "eval", folder)
            rows += [row for file in sorted(Path(folder).rglob(DESCRIPTOR)) for row in evidence_rows(file.parent)]
    if not rows:
        raise UserError(
            f"no run of MLflow experiment {experiment!r} in {uri} was evaluated; train with eval=panel first"
        )
    return _unique(rows)


def evidence_rows(folder: Path) -> list[Row]:
    """Rows of one evidence folder: the descriptor's fields and each split's summary."""
    try:
        descriptor = json.loads((folder / DESCRIPTOR).read_text())
        summaries = {file.parent.name: json.loads(file.read_text()) for file in sorted(folder.glob(f"*/{SUMMARY}"))}
    except json.JSONDecodeError as error:
        raise UserError(f"evidence in {folder} is damaged ({error}); delete the folder and evaluate again") from error
    return [
        {
            **descriptor,
            "split": split,
            **{key: summary[key] for key in ("episodes", "successes", "success_rate", "ci_low", "ci_high")},
            "smoothness": summary["mean_squared_jerk"],
            "seam_jump_mm": summary["seam_jump_mm"],
            "latency": summary["latency_ms_median"],
            "latency_p95": summary["latency_ms_p95"],
            "mean_steps": summary["mean_steps"],
            "unreachable_per_episode": summary["unreachable_per_episode"],
            "measures": summary.get("measures", {}),  # older evidence has none
            "success_by_family": summary["success_by_family"],
            "question": summary["question"],
            "episodes_key": _episodes_key(summary["request"]),
            "outcomes": summary["outcomes"],
            "folder": str(folder / split),
        }
        for split, summary in summaries.items()
    ]


def _episodes_key(request: dict[str, Any]) -> str:
    """Equal for two summaries exactly when they are about the same episodes, so that they may be paired."""
    return json.dumps([request["first_seed"], request["episodes"], request["env"]], sort_keys=True)


def _unique(rows: Iterable[Row]) -> list[Row]:
    """One row per policy, milestone and split; the last one wins."""
    return list({(row["run"], row["steps"], row["split"]): row for row in rows}.values())
