"""The work of a sweep's job: train or evaluate its tasks. `vlaexp/sweep/node.py` minds its state and its signals."""

from pathlib import Path
from typing import Any

from vlaexp.config import compose
from vlaexp.errors import UserError
from vlaexp.sweep.jobs import Job, Task, parse
from vlaexp.sweep.node import Tell, run_job


def work(folder: str, key: str) -> None:
    """What every launcher calls for a job of the sweep in `folder`."""
    run_job(folder, key, perform)


def perform(job: Job, plan: dict[str, Any], tell: Tell) -> list[Path]:
    """Run a job's tasks; returns policy folders and evidence."""
    if job.phase != "evaluate" and job.tasks[0].verb == "eval":
        return _evaluate(job.tasks[0], plan, tell)
    return _train(job, plan, tell)


def _evaluate(task: Task, plan: dict[str, Any], tell: Tell) -> list[Path]:
    from vlaexp.workflow.evaluate import evaluate_verb

    folder = evaluate_verb(compose("eval", (*task.overrides, *plan["common"]))).folder
    tell(evidence={task.name: [str(folder)]})
    return [folder]


def _train(job: Job, plan: dict[str, Any], tell: Tell) -> list[Path]:
    from vlaexp.workflow.train import train

    made: list[Path] = []
    runs: dict[str, str] = {}
    for task in job.tasks:
        overrides = task.overrides if job.phase != "train" else without_evaluation(task.overrides)

        def on_run(run: Path, name: str = task.name) -> None:
            runs[name] = str(run)
            tell(runs=runs)

        result = train(compose("train", (*overrides, *plan["common"])), on_run)
        made += [*result.milestones.values(), *(found.folder for found in result.evaluation.values())]
    return made


def without_evaluation(overrides: tuple[str, ...]) -> tuple[str, ...]:
    """Overrides of the training alone."""
    return (*(text for text in overrides if parse(text)[0].split(".")[0] != "eval"), "eval=none")
