"""`vlaexp sweep`: a whole study in one command. Record, train and evaluate every point, compare, report.

Asked again it repeats nothing: datasets that exist are kept, finished trainings and evaluations are recognised.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from vlaexp.config import compose, resolved
from vlaexp.errors import UserError
from vlaexp.report.collect import collect_folders
from vlaexp.sweep.grid import Point, expand
from vlaexp.sweep.local import run_points
from vlaexp.trainer.run_log import RunLog
from vlaexp.workflow.compare import publish


@dataclass(frozen=True)
class StudyResult:
    """Where the study's report is, what it says, and which points failed."""

    folder: Path
    comparison: dict[str, Any]
    files: list[Path]
    failed: dict[str, str]


def study(cfg: DictConfig) -> StudyResult:
    """Run the study of a configuration."""
    if not cfg.arms:
        raise UserError("this study has no arms; choose one with experiment=..., see conf/experiment")
    points = expand(resolved(cfg.arms))
    began = time.monotonic()
    for overrides in cfg.record:
        _record(cfg, list(overrides))
    folder = Path(cfg.outputs) / cfg.name
    folder.mkdir(parents=True, exist_ok=True)
    # The parent run is opened before any point: a cold SQLite store does not survive several first visitors at once.
    log = RunLog(folder, instantiate(cfg.tracker), cfg.name, {"question": cfg.question}, {"vlaexp.role": "study"})
    parent = log.open().get("mlflow_run_id", "null")
    status = "failed"
    try:
        everywhere = (*cfg.everywhere, f"outputs={cfg.outputs}", f"parent_run={parent}")
        points = [Point(point.name, point.verb, (*point.overrides, *everywhere)) for point in points]
        print(f"{len(points)} points, {cfg.processes} at a time: {', '.join(p.name for p in points)}", file=sys.stderr)
        evidence, failed = run_points(points, run_point, cfg.processes)
        if not evidence:
            raise UserError(f"every point of the study failed; the first: {next(iter(failed.values()))}")
        folders = [Path(path) for point in points for path in evidence.get(point.name, [])]
        comparison, files = publish(
            collect_folders(folders), list(cfg.axes), cfg.question, cfg.title, folder, cfg.command
        )
        for file in files:
            log.artifact(file)
        status = "finished"
    finally:
        log.finish(status)
    print(f"study {cfg.name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    return StudyResult(folder, comparison, files, failed)


def _record(cfg: DictConfig, overrides: list[str]) -> None:
    from vlaexp.workflow.record import record

    recording = compose("record", [*overrides, f"outputs={cfg.outputs}"])
    if Path(recording.dataset.root).exists():
        print(f"dataset {recording.dataset.root} exists", file=sys.stderr)
    else:
        record(recording)


def run_point(point: Point) -> list[str]:
    """Run one point in this process; returns its evidence folders."""
    from vlaexp.workflow.evaluate import evaluate_verb
    from vlaexp.workflow.train import train

    cfg = compose(point.verb, point.overrides)
    if point.verb == "eval":
        return [str(evaluate_verb(cfg).folder)]
    return [str(result.folder) for result in train(cfg).evaluation.values()]
